"""Signals that are handled later. Oracle: Python's own handlers."""

import multiprocessing
import os
import signal
import time

import pytest

from qat.launch import signals
from qat.launch.signals import REQUEUE_SIGNALS, SIGNALS, Preempted


@pytest.fixture(autouse=True)
def untouched():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_training_a_signal_counts_at_once(number):
    with signals.handle_signals(), pytest.raises(Preempted) as stop:
        send(number)
    assert (stop.value.signal, stop.value.step, stop.value.saved) == (number, None, None)
    assert stop.value.wants_requeue == (number in REQUEUE_SIGNALS)


def test_cleaning_up_after_it_is_not_interrupted():
    cleaned = []

    def tidy():
        try:
            send(signal.SIGUSR1)
        finally:
            send(signal.SIGTERM)
            cleaned.append(True)

    with signals.handle_signals(), pytest.raises(Preempted) as stop:
        tidy()
    assert cleaned == [True]
    assert stop.value.signal == signal.SIGUSR1


def test_inside_training_it_is_noted_and_the_wish_to_stop_outranks():
    with signals.handle_signals():
        signals.defer(on=True)
        for number, expected in (
            (signal.SIGUSR2, signal.SIGUSR2),
            (signal.SIGTERM, signal.SIGTERM),
            (signal.SIGUSR1, signal.SIGTERM),
        ):
            send(number)
            assert signals.received_signal() == expected
    with signals.handle_signals():
        assert signals.received_signal() == 0, "a job is not stopped by what the one before it got"


def _interrupted(seconds):
    with signals.handle_signals():
        signals.defer(on=True)
        send(signal.SIGINT)
        send(signal.SIGINT)  # the same Ctrl-C, by way of torchrun
        time.sleep(seconds)
        send(signal.SIGINT)
        os._exit(7)


@pytest.mark.parametrize(("seconds", "code"), [(0, 7), (0.2, 130)])
def test_a_second_ctrl_c_does_not_wait(monkeypatch, capfd, seconds, code):
    monkeypatch.setattr(signals, "ECHO_S", 0.1)
    process = multiprocessing.get_context("fork").Process(target=_interrupted, args=(seconds,))
    process.start()
    process.join(10)
    assert process.exitcode == code
    line = "stopped by Ctrl-C at once; files that were saved before are unchanged\n"
    assert capfd.readouterr().err == ("" if code == 7 else line)


def test_ctrl_c_stays_ignored_in_the_background_of_a_script(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handle_signals():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def _loader(ready, is_marked):
    if is_marked:
        signals.ignore_signals(0)
    ready.set()
    time.sleep(0.3)
    os._exit(7)


@pytest.mark.parametrize(("number", "is_marked"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_loader_process_sees_its_training_process_through(number, is_marked):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    with signals.handle_signals():
        process = context.Process(target=_loader, args=(ready, is_marked), daemon=True)
        process.start()
        ready.wait(10)
        os.kill(process.pid, number)
        process.join(10)
        assert process.exitcode == 7, "the signal neither killed it nor raised in it"
        assert signals.received_signal() == 0
