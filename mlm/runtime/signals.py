"""How a run ends early: Ctrl-C and SIGTERM, and readable messages where memory, compiler or network fail."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.distributed import DistBackendError

from Config import Config
from mlm.errors import UserError
from mlm.runtime.hardware import OutOfMemory, detect_out_of_memory
from mlm.runtime.heartbeat import lost_touch


class Stopped(Exception):
    """Work that was given up, as a rank was told to stop."""


@dataclass
class StopRequest:
    """Whether Ctrl-C or SIGTERM told the run to stop."""

    received: list[int] = field(default_factory=list)  # the signals that came to this process
    is_agreed: bool = False  # whether all ranks know that one of them has received one

    @property
    def exit_status(self) -> int:
        return 128 + (self.received[0] if self.received else signal.SIGTERM)  # else another rank received it

    def listen(self, speak: bool) -> None:
        """Notes Ctrl-C and SIGTERM from now on, so that a step can be finished.

        After a Ctrl-C, another one or a SIGTERM exits at once. After a SIGTERM only a Ctrl-C does, as launchers and
        schedulers each send a SIGTERM to every rank.
        """

        def note(number, frame):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if number == signal.SIGINT:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if speak and not self.received:  # by os.write, as a print cannot interrupt a print
                os.write(2, b"\nfinishing the step and saving; a second Ctrl-C exits at once\n")
            self.received.append(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)


@contextmanager
def translate_failures(config: Config) -> Iterator[None]:
    """Ends the process with a readable message where memory, compiler or network fail, or a signal comes early. Raises
    UserError for what the user can put right, and SystemExit for the rest."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with detect_out_of_memory():
            yield
    except KeyboardInterrupt:
        print("\nstopped before training began; nothing is lost", file=sys.stderr)
        sys.exit(130)
    except OutOfMemory as error:
        raise UserError(f"micro_batch_tokens, sen_max_length: out of memory; lower ones need less. {error}") from error
    except RuntimeError as error:
        if config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = " ".join(str(error).splitlines()[:2])
            raise UserError(f"compile: the model cannot be compiled here; leave it out. {reason}") from error
        if not (isinstance(error, DistBackendError) or "gloo" in str(error)):
            raise
        print(lost_touch(config.path_model_save), file=sys.stderr)
        sys.exit(1)
