"""A Ray address that does not answer is an error in time."""

import socket
import time

import pytest

from fracbit.errors import OutputError, RecipeError
from fracbit.sweeps.address import check_address


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer_is_an_error_within_15_seconds(scheme: str) -> None:
    with socket.socket() as silent:  # accepts, and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(OutputError, match="no Ray cluster at"):
            check_address(f"{scheme}127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 15


def test_a_closed_port_is_an_error_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(OutputError, match="leave --address out"):
        check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["", "somewhere", "host:port"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(RecipeError, match="not a Ray address"):
        check_address(address)
