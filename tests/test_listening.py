"""Sockets on which services listen."""

import socket

from ulsam.apps.listening import listen


def test_what_is_sent_does_not_wait_for_what_was_sent() -> None:
    """A header's receipt may take 40 ms, and the body behind it would wait for that."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
