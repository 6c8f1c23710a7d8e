"""The one exception for what a user can put right, and the disk's part in others."""

import errno


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    Entries print it as `error: <message>` to standard error and leave with exit status 2.
    """


def disk_trouble(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if that is what `error` or a cause of it says."""
    texts = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
    texts |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "the folder is not writable")
    while error is not None:
        if isinstance(error, OSError) and error.errno in texts:
            return texts[error.errno]
        if "No space left on device" in str(error):  # from TensorStore, which raises ValueError
            return texts[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None
