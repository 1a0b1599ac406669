"""A user's mistakes, as one line each."""

import contextlib


class UserError(ValueError):
    """A mistake that the user can mend.

    Its text is the whole message: what was found, where, and what was expected.
    """


@contextlib.contextmanager
def user_errors(where=""):
    """Turn a ValueError of the method's files into a UserError, around calls with a user's values.

    model.py, lora.py and identify.py raise plain ValueErrors, so that they can be copied alone.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from e
