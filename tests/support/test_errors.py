"""A user's mistakes are told from ours."""

import pytest

from support.errors import UserError, user_errors


def test_a_value_error_becomes_the_users_with_its_place():
    with pytest.raises(UserError, match="^file: rank 9$"), user_errors("file"):
        raise ValueError("rank 9")


def test_without_a_place_the_text_stays():
    with pytest.raises(UserError, match="^rank 9$"), user_errors():
        raise ValueError("rank 9")


def test_a_users_error_stays_as_it_is():
    mistake = UserError("as it is")
    with pytest.raises(UserError) as error, user_errors("file"):
        raise mistake
    assert error.value is mistake


def test_any_other_error_is_ours():
    with pytest.raises(KeyError), user_errors("file"):
        raise KeyError("x")
