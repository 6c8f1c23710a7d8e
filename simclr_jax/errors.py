"""The one exception for what a user can put right, and the disk's part in others."""

import errno
import os


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    Entries print it as `error: <message>` to standard error and leave with exit status 2.
    """


def disk_trouble(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if that is what `error` or a cause of it says."""
    texts = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
    texts[errno.EFBIG] = "a file is larger than the system allows (see ulimit -f)"
    texts |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "the folder is not writable")
    while error is not None:
        for number, text in texts.items():
            # TensorStore raises ValueError, with the system's words.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return text
        error = error.__cause__ or error.__context__
    return None
