"""Processes for decoders that must not meet in one: a peer that crashes or hangs is reported, and the rest goes on."""

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection


def _serve(pipe: Connection, build: Callable, args: tuple) -> None:
    """Build the functions, tell their names, then run the one that is asked for and send what it returns."""
    try:
        functions, notes = build(*args)
        pipe.send((True, (list(functions), notes)))
        while (request := pipe.recv()) is not None:
            name, *rest = request
            pipe.send((True, functions[name](*rest)))
    except Exception as error:  # whatever a peer raises belongs into the report
        pipe.send((False, f"{type(error).__name__}: {error}"))
        traceback.print_exc()


class Worker:
    """A process that holds what `build(*args)` returns: functions by name, and notes. build must be picklable.

    `ask` raises RuntimeError when the process fails, ends or takes longer than `seconds`; it is stopped then.
    """

    def __init__(self, build: Callable, args: tuple, seconds: float = 150):
        self.pipe, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=_serve, args=(theirs, build, args), daemon=True)
        self.process.start()
        theirs.close()
        self.names, self.notes = self._receive(seconds)

    def _receive(self, seconds: float):
        try:
            if not self.pipe.poll(seconds):
                raise RuntimeError(f"no answer within {seconds:.0f} s")
            done, value = self.pipe.recv()
        except EOFError:
            done, value = False, "the process ended"
        except RuntimeError:
            self.stop()
            raise
        if not done:
            self.stop()
            raise RuntimeError(value)
        return value

    def ask(self, name: str, *arguments, seconds: float = 60):
        """What the function of that name returns for the arguments."""
        self.pipe.send((name, *arguments))
        return self._receive(seconds)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
