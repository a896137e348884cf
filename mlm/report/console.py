"""The log: what a run found, lines as it goes, metrics.csv and the tracker, and why it diverged."""

from typing import Any

from Config import Config
from mlm.data.chunks import Corpus
from mlm.data.text_stats import SHOWN_SPLIT_WORDS, text_warnings, used_splits
from mlm.data.words import MANY_SUBWORDS
from mlm.evaluation.loss import Change, Evaluation, perplexity
from mlm.settings import describe_settings
from mlm.terminal import figure, render, with_error
from mlm.training.checkpoint import checkpoint_path
from mlm.training.plan import Plan
from mlm.training.progress import Progress
from mlm.training.run import Ending, Setup


def describe_run(given: Config, config: Config, corpus: Corpus, derived: dict[str, Any]) -> str:
    """Returns settings, what was found in the text, and derived numbers, for people."""
    stats, only_test = corpus.stats, config.evaluate_only
    return render(
        "report/templates/setup.txt",
        settings=describe_settings(config, given),
        stats=stats,
        splits=used_splits(stats, only_test),
        only_test=only_test,
        many_subwords=MANY_SUBWORDS,
        split_words=stats.split_words[:SHOWN_SPLIT_WORDS],
        warnings=text_warnings(stats, config.initial_pretrain_tokenizer, only_test),
        added_words=corpus.added_words,
        derived=derived,
    )


def describe_evaluation(
    step: int, total_steps: int, evaluation: Evaluation, change: Change | None, test_chunks: int
) -> str:
    """Returns a line of scores with their standard errors, and of how the loss changed on the same chunks.

    test_chunks: in the whole test text.
    """
    chunks = len(evaluation.losses)
    sample = f"{chunks:,} of {test_chunks:,} chunks" if chunks < test_chunks else "all chunks"
    heading = f"step {step}/{total_steps}" if step else "before training"
    line = (
        f"{heading}, test ({sample}): perplexity {with_error(evaluation.perplexity, evaluation.perplexity_se)}, "
        f"masked accuracy {evaluation.accuracy:.1%}"
    )
    return line + (f"; loss {change.loss:+.3f} ± {change.se:.3f} from the baseline" if change else "")


def describe_training(step: int, plan: Plan, figures: dict[str, float]) -> str:
    """Returns a line about the steps since the last such line; figures: what `metrics.training_figures` returned."""
    train_loss = figures["train_loss"]
    return (
        f"step {step}/{plan.steps}, epoch {plan.epochs(step):.2f}: loss {train_loss:.3f}, "
        f"perplexity {figure(perplexity(train_loss))}, lr {figures['lr']:.2e}, {figures['tokens_per_s']:,.0f} tokens/s"
    )


def describe_divergence(setup: Setup, progress: Progress, ending: Ending, saved_step: int | None) -> str:
    """Returns what went wrong, the setting to change, and where the last finite weights are."""
    what = f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, had no finite loss and gradient"
    if ending is Ending.BROKEN:
        what = f"the weights after step {progress.step} are not finite"
    rate = f"most often {setup.config.learning_rate:g} is too high. Begin a new run with a lower one"
    lines = [f"learning_rate: {what}; {rate}"]
    if saved_step is not None:
        lines.append(f"  the last finite weights are in {checkpoint_path(setup.folder, saved_step)}")
    if progress.best:
        lines.append(f"  those with the lowest test loss are in {setup.folder / 'best'}")
    return "\n".join(lines)
