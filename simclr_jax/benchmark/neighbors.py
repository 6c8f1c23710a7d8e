"""Times the search for nearest neighbours side by side with others', and measures the memory that it takes.

    python -m simclr_jax.benchmark neighbors [--FLAG=VALUE ...]

    --queries=10000       rows that are searched for
    --bank=50000          rows among which is searched
    --width=512           numbers in a row
    --k=1                 neighbours of each query
    --metric=euclidean    or cosine
    --repeats=5           timed searches of each, taken in turns
    --peers=scikit-learn,faiss
                          whom to measure beside this package; or none
    --out=FILE.json       all figures, with versions, hardware, date and commit

Everyone gets the same float32 rows in NumPy, drawn from a normal distribution, compares all pairs, and
returns distances and indices in NumPy.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from absl import flags

from simclr_jax.benchmark import peak, timing
from simclr_jax.errors import UserError
from simclr_jax.logs import say, write_json
from simclr_jax.neighbors import METRICS, nearest

OURS = "simclr_jax"
PEERS = {"scikit-learn": "sklearn", "faiss": "faiss"}  # and the modules they are imported as

_LARGEST_COPY = 10**9  # bytes; faiss keeps a copy of the bank, for a time two
_SIDE = 4096  # of the product that gives the rate
_PRODUCTS = 3

FLAGS = flags.FlagValues()
_QUERIES = flags.DEFINE_integer(
    "queries", 10000, "Rows that are searched for.", lower_bound=1, flag_values=FLAGS
)
_BANK = flags.DEFINE_integer("bank", 50000, "Rows among which is searched.", lower_bound=1, flag_values=FLAGS)
_WIDTH = flags.DEFINE_integer("width", 512, "Numbers in a row.", lower_bound=1, flag_values=FLAGS)
_K = flags.DEFINE_integer("k", 1, "Neighbours of each query.", lower_bound=1, flag_values=FLAGS)
_METRIC = flags.DEFINE_enum("metric", METRICS[0], METRICS, "Of the distance.", flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed searches of each.", lower_bound=1, flag_values=FLAGS)
_PEERS = flags.DEFINE_list("peers", list(PEERS), "Whom to measure beside, or none.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures.", flag_values=FLAGS)

Search = Callable[[], np.ndarray]


def normal_rows(count: int, width: int, seed: int) -> np.ndarray:
    """Float32 [count, width] from a standard normal distribution, made in place: nothing else is held."""
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def left_out(peers: Sequence[str], bank_bytes: int) -> dict[str, str]:
    """Those of `peers` that cannot be measured with a bank of that size, and why.

    Args:
      peers: names of `PEERS`.
      bank_bytes: size of the bank.
    """
    reasons = {
        name: "not installed: pip install -e '.[benchmark]'"
        for name in peers
        if importlib.util.find_spec(PEERS[name]) is None
    }
    if "faiss" in peers and bank_bytes > _LARGEST_COPY:
        reasons.setdefault("faiss", f"it would copy the bank, which takes {bank_bytes / 1e9:.1f} GB")
    return reasons


def searches(
    queries: np.ndarray, bank: np.ndarray, k: int, metric: str, peers: Sequence[str]
) -> dict[str, Search]:
    """What is timed, by name: functions of nothing to the indices [Q, k] of the neighbours.

    What a peer can do once for many searches is done here: scikit-learn keeps the bank, faiss makes its
    index of it, and for the cosine its rows of length 1.

    Args:
      queries: float32 [Q, F].
      bank: float32 [N, F].
      k: number of neighbours, 1 to N.
      metric: one of `simclr_jax.neighbors.METRICS`.
      peers: those of `PEERS` to measure, which have to be installed.
    """
    found: dict[str, Search] = {OURS: lambda: nearest(queries, bank, k, metric)[1]}
    prepare = {"scikit-learn": _scikit_learn, "faiss": _faiss}
    return found | {name: prepare[name](queries, bank, k, metric) for name in peers}


def _scikit_learn(queries: np.ndarray, bank: np.ndarray, k: int, metric: str) -> Search:
    neighbors: Any = importlib.import_module("sklearn.neighbors")
    index = neighbors.NearestNeighbors(algorithm="brute", metric=metric, n_jobs=-1).fit(bank)
    return lambda: index.kneighbors(queries, k)[1]


def _faiss(queries: np.ndarray, bank: np.ndarray, k: int, metric: str) -> Search:
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(timing.cores())
    if metric == "cosine":
        index = faiss.IndexFlatIP(bank.shape[1])
        queries, bank = (
            rows / np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float32) for rows in (queries, bank)
        )
    else:
        index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    return lambda: index.search(queries, k)[1]


def measure(
    runs: Mapping[str, Search], repeats: int
) -> tuple[dict[str, timing.Times], dict[str, dict[str, Any]]]:
    """Times searches in turns and compares what they find.

    Args:
      runs: as from `searches`.
      repeats: timed searches of each.

    Returns:
      By name, the times, and the figures for JSON: milliseconds, times slower than this package, and the
      share of indices, in [0, 1], that are those of this package.
    """
    indices: dict[str, np.ndarray] = {}

    def kept(name: str, search: Search) -> None:
        indices[name] = search()

    times = timing.in_turns(
        {name: functools.partial(kept, name, search) for name, search in runs.items()}, repeats
    )
    figures = {
        name: {
            "ms": time.milliseconds(),
            "times_slower": round(time.median / times[OURS].median, 3),
            "same_index": float(np.mean(indices[name] == indices[OURS])),
        }
        for name, time in times.items()
    }
    return times, figures


# -------------------------------------------------------------------------------------- memory


def extra_memory(queries: int, bank: int, width: int, k: int, metric: str) -> int | None:
    """Bytes that one search takes beside its arguments, in a fresh process, compilation included.

    Args:
      queries: how many.
      bank: rows of the bank.
      width: numbers in a row.
      k: number of neighbours, 1 to `bank`.
      metric: one of `simclr_jax.neighbors.METRICS`.

    Returns:
      On a CPU the peak of the resident set over what it was before; else the peak of the device's memory,
      of the fullest one. None where the system, or the device, does not tell.

    Raises:
      UserError: if the process gets too little memory.
    """
    try:
        return peak.in_fresh_process(_search_memory, queries, bank, width, k, metric)
    except (MemoryError, BrokenProcessPool) as error:
        raise UserError("there is too little memory for these rows; lower --bank or --width") from error


def _search_memory(queries: int, bank: int, width: int, k: int, metric: str) -> int | None:
    rows = normal_rows(queries, width, 0), normal_rows(bank, width, 1)
    search = functools.partial(nearest, *rows, k, metric)
    with timing.no_kept_compilations():
        return peak.of_call(search)


# -------------------------------------------------------------------------------- command line


def rows(times: Mapping[str, timing.Times], figures: Mapping[str, Any]) -> list[str]:
    """The lines of the table: a search each, and the floor."""
    memory = figures["extra_bytes"]
    used = "not measured" if memory is None else f"{memory / 1e6:,.0f} MB"
    table = [_line("", "s: median (least-most)", "of ours", "same index", "extra memory")]
    for name, time in times.items():
        median, least, most = (
            timing.short(seconds) for seconds in (time.median, min(time.seconds), max(time.seconds))
        )
        found = figures["searches"][name]
        table.append(
            _line(
                name,
                f"{median} ({least}-{most})",
                f"{timing.short(found['times_slower'])} x",
                f"{100 * found['same_index']:.2f} %",
                used if name == OURS else "",
            )
        )
    floor = figures["floor_ms"] / 1000
    return [*table, _line("floor", timing.short(floor), f"{timing.short(floor / times[OURS].median)} x")]


def _line(label: str, seconds: str, *cells: str) -> str:
    return (f"{label:<13}{seconds:>24}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def main() -> int:
    """Runs the command line; returns the exit status."""
    load = os.getloadavg()[0]
    if _K.value > _BANK.value:
        raise UserError(f"--k must be at most --bank, {_BANK.value}; got {_K.value}")
    asked, out = _checked_peers(_PEERS.value), timing.checked_out(_OUT.value)
    reasons = left_out(asked, 4 * _BANK.value * _WIDTH.value)
    peers = [name for name in asked if name not in reasons]

    # First, while neither the bank nor a GPU's memory is taken here.
    memory = extra_memory(_QUERIES.value, _BANK.value, _WIDTH.value, _K.value, _METRIC.value)
    rates = timing.product_rates(_SIDE, _PRODUCTS)
    operations = 2 * _QUERIES.value * _BANK.value * _WIDTH.value
    figures = timing.circumstances() | {
        "load_before": round(load, 2),
        "queries": _QUERIES.value,
        "bank": _BANK.value,
        "width": _WIDTH.value,
        "k": _K.value,
        "metric": _METRIC.value,
        "repeats": _REPEATS.value,
        "product_side": _SIDE,
        "product_flops_per_second": {name: round(rate) for name, rate in rates.items()},
        "floor_ms": round(1000 * operations / max(rates.values()), 4),
        "extra_bytes": memory,
        "left_out": reasons,
    }
    for text in _preface(figures, peers):
        say(text)
    queries = normal_rows(_QUERIES.value, _WIDTH.value, 0)
    bank = normal_rows(_BANK.value, _WIDTH.value, 1)
    times, figures["searches"] = measure(
        searches(queries, bank, _K.value, _METRIC.value, peers), _REPEATS.value
    )
    for text in rows(times, figures):
        say(text)
    if out is not None:
        write_json(out, figures)
    return 0


def _preface(figures: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    """The lines before the table: where, what disturbs, who is missing, what is measured."""
    hardware = figures["hardware"]
    on_cpu = hardware["platform"] == "cpu"
    lines = timing.where(hardware, figures["load_before"])
    lines += [f"{name} is left out, {reason}" for name, reason in figures["left_out"].items()]
    rates = ", ".join(
        f"{name} {rate / 1e9:,.0f}" for name, rate in figures["product_flops_per_second"].items()
    )
    index = "IndexFlatIP, rows of length 1 beforehand" if figures["metric"] == "cosine" else "IndexFlatL2"
    cores, side = hardware["cores"], figures["product_side"]
    said = {
        OURS: f"neighbors.nearest, exact to float64, on the {'CPU' if on_cpu else 'device'}",
        "scikit-learn": f'NearestNeighbors(algorithm="brute"), {cores} threads',
        "faiss": f"{index}, {cores} threads; index made beforehand",
        "floor": f"2 x queries x bank x width at the best rate of a float32 product of {side}x{side}",
        "": f"  (GFLOP/s: {rates})",
        "same index": f"share of indices equal to those of {OURS}; ties may differ",
        "extra memory": "one search in a fresh process, compiling included: peak "
        + ("beyond what was resident before" if on_cpu else "on the device, bank included"),
    }
    lines += [f"  {name:<13} {text}" for name, text in said.items() if name not in PEERS or name in peers]
    shape = f"{figures['queries']:,} queries, a bank of {figures['bank']:,}, width {figures['width']}"
    return [*lines, "", f"{shape}, k {figures['k']}, {figures['metric']}"]


def _checked_peers(names: Sequence[str]) -> list[str]:
    if names == ["none"]:
        return []
    if not names or not set(names) <= PEERS.keys():
        raise UserError(f"--peers must be none or some of {','.join(PEERS)}; got {','.join(names)!r}")
    return [name for name in PEERS if name in names]
