"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    Entries print it as `error: <message>` to standard error and leave with exit status 2.
    """
