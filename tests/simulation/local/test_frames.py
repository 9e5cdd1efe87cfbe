"""Frames between the engine and its workers."""

import os
import socket
import threading

import pytest

from fedbus.simulation.local import frames
from fedbus.simulation.local.frames import FrameReader, PeerClosed


def test_a_frame_carries_an_object_bytes_and_file_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        blob = os.urandom(300_000)
        sender = threading.Thread(target=frames.send, args=(ours, frames.dump({"a": 1}, [blob, b"end"])))
        sender.start()
        frame = FrameReader(theirs).read()
        sender.join()
        assert frame is not None
        assert frame[0] == {"a": 1}
        assert bytes(frame[1]) == blob + b"end"


def test_the_end_of_the_other_process_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(PeerClosed):
            FrameReader(theirs).read()
        with pytest.raises(PeerClosed):
            frames.send(theirs, [b"x" * 1_000_000])
