"""The launcher that run.sh starts: train.py in one process, or checked in one and then in one per GPU.

Where a rank fails, one readable message says so.
"""

import logging
import os
import signal
import subprocess
import sys

from Config import parse_flags
from mlm.errors import UserError, first_line, plain_errors
from mlm.runtime.hardware import choose_devices, count_gpus, native_precision, stay_on_cpu

SECONDS_TO_SAVE = "45"  # between a signal and the launcher's kill; torch before 2.13 always waits 30


def main() -> None:
    """Starts train.py with this command's flags, as `accelerate config` was answered, or else once per GPU.

    The exit status is train.py's own: 2 for a mistake of the user's, 130 and 143 after Ctrl-C and SIGTERM.
    Raises UserError for an `accelerate config` that does not fit.
    """
    flags = sys.argv[1:]
    config = parse_flags(flags)
    choose_devices(config)

    from accelerate.commands import launch  # here, as it takes seconds and wrong flags should not
    from yaml import YAMLError

    options = []
    if not os.path.isfile(launch.default_config_file):
        if count_gpus() < 2:  # train.py takes this process's place: signals and exit status need no forwarding
            os.execv(sys.executable, [sys.executable, "train.py", *flags])
        options = ["--num_machines=1", f"--mixed_precision={native_precision()}", "--dynamo_backend=no"]
    if config.cuda_visible_devices or options:
        options += ["--gpu_ids=all", f"--num_processes={count_gpus()}"]  # of one machine
    try:  # the file of `accelerate config` may be damaged, or of another version
        arguments = launch.launch_command_parser().parse_args([*options, "train.py", *flags])
        arguments, *_ = launch._validate_launch_command(arguments)  # adds what that file says
        if config.cuda_visible_devices:
            arguments.num_processes *= arguments.num_machines
        if arguments.use_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        _check_configuration(arguments)
        command, environment = launch.prepare_simple_launcher_cmd_env(arguments)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, YAMLError) as error:
        raise UserError(
            f"accelerate config: {launch.default_config_file} cannot be used: {first_line(error).rstrip('.')}. Run "
            "`accelerate config` again"
        ) from error
    environment["ACCELERATE_USE_CPU"] = str(stay_on_cpu())
    if arguments.num_processes == 1:
        os.execvpe(command[0], command, environment)

    # In one process first, where a wrong setting or text is one message, and not one from each rank.
    check = subprocess.run([*command, "--check_only"], env=environment, stdout=subprocess.DEVNULL)
    if check.returncode:
        sys.exit(check.returncode)
    _start_ranks(arguments)


def _start_ranks(arguments):
    """Starts a rank on each device of this machine, and ends with a status that says what came of them."""
    from accelerate.commands.launch import multi_gpu_launcher
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # the launcher's own report of the failures below
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    try:
        multi_gpu_launcher(arguments)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except DistError as error:
        first = f"{arguments.main_process_ip}:{arguments.main_process_port}"
        raise UserError(
            f"accelerate config: the first machine, {first}, does not answer: {first_line(error)}"
        ) from error
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in (2, 130, 143):  # the rank has said why
            sys.exit(failure.exitcode)
        print(f"error: rank {rank} ended with status {failure.exitcode}; the others were stopped", file=sys.stderr)
        sys.exit(1)


def _check_configuration(arguments):
    """Raises UserError where `accelerate config` asks for what BERT does not need, or for GPUs that are not here."""
    if arguments.use_deepspeed or arguments.use_fsdp or arguments.use_megatron_lm or arguments.tpu:
        raise UserError(
            "accelerate config: DeepSpeed, FullyShardedDataParallel, Megatron-LM and TPUs are not supported; a BERT "
            "fits on one GPU. Run `accelerate config` again and answer NO to them"
        )
    each, uneven = divmod(arguments.num_processes, arguments.num_machines)
    if not each or uneven:  # with one for two machines, each would train alone
        raise UserError(
            f"accelerate config: {arguments.num_processes} process(es) are not the same number on each of "
            f"{arguments.num_machines} machines; the answer counts those of all of them. Run `accelerate config` again"
        )
    if each > max(1, count_gpus()) and not stay_on_cpu():  # one may be an Apple GPU or a CPU
        raise UserError(
            f"accelerate config: asks for {each} GPU(s), of which {count_gpus()} can be used here. Run `accelerate "
            "config` again, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no traceback; the launcher and train.py have handlers
    with plain_errors():
        main()
