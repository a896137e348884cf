"""The log: what a run found, lines as it goes, metrics.csv and the tracker, and why it diverged."""

from typing import Any

from tqdm import tqdm

from Config import Config
from mlm.data.chunks import Corpus
from mlm.data.text_stats import SHOWN_SPLIT_WORDS, TextStats, splits_of, text_warnings
from mlm.data.words import MANY_SUBWORDS, SplitWord
from mlm.evaluation.loss import Change, Evaluation, perplexity
from mlm.report.metrics import record
from mlm.settings import describe_settings
from mlm.terminal import figure, say, with_error
from mlm.training.plan import learning_rate_at
from mlm.training.run import Ending, Progress, Run, Unreported, checkpoint_path
from mlm.training.time_left import time_left

# --------------------------------------------------------------------------------------------------------------- before


def describe_run(given: Config, config: Config, data: Corpus, derived: dict[str, Any]) -> str:
    """Settings, text and derived numbers, for people."""
    parts = [
        f"settings (* differs from Config.py's default)\n{describe_settings(config, given)}\n",
        f"text\n{describe_text(data.stats, config.initial_pretrain_tokenizer, config.evaluate_only)}\n",
        "derived\n" + "".join(f"   {name:<26}  {value}\n" for name, value in derived.items()),
    ]
    if data.added_words:
        parts.insert(2, f"added to the vocabulary\n   {', '.join(data.added_words)}\n")
    return "\n".join(parts)


def describe_text(stats: TextStats, tokenizer_name: str, only_test: bool) -> str:
    """What was found in the text: a line per split, words split into subwords, warnings."""
    lines = []
    for name, split in splits_of(stats, only_test).items():
        tokens_a_line = split.tokens / (split.lines - split.blank)
        lines.append(
            f"   {name:<5}  {split.lines:,} lines, {split.blank:,} blank, {split.duplicate:,} duplicate, "
            f"{split.dropped:,} dropped; {split.tokens:,} tokens, {tokens_a_line:.1f} a line, "
            f"{split.unknown / split.tokens:.2%} [UNK]; {split.chunks:,} chunks"
        )
    if not only_test:
        lines.append(f"   test lines that are also training lines: {stats.test_lines_in_train:,}")
        lines.append(_describe_split_words(stats.split_words))
    return "\n".join([*lines, *text_warnings(stats, tokenizer_name, only_test)])


def _describe_split_words(split_words: list[SplitWord]) -> str:
    """Lists the most frequent: a heading, then count, word and subwords."""
    criterion = f"{MANY_SUBWORDS} or more; Chinese: a rare or unknown character"
    lines = [
        f"   {split.occurrences:>9,}  {split.word}   {' '.join(split.subwords)}"
        for split in split_words[:SHOWN_SPLIT_WORDS]
    ]
    return "\n".join([f"   words split into subwords ({criterion}):", *(lines or ["        none"])])


# --------------------------------------------------------------------------------------------------------------- during


def report_evaluation(run: Run, progress: Progress, evaluation: Evaluation, change: Change | None) -> None:
    """Scores with their standard errors, and how they changed since the start on the same chunks of the test text."""
    chunks, step = len(evaluation.losses), progress.step
    sample = f"{chunks:,} of {len(run.data.test):,} chunks" if chunks < len(run.data.test) else "all chunks"
    heading = f"step {step}/{run.config.max_steps}" if step else "before training"
    line = (
        f"{heading}, test ({sample}): perplexity {with_error(evaluation.perplexity, evaluation.perplexity_se)}, "
        f"masked accuracy {evaluation.accuracy:.1%}"
    )
    figures: dict[str, float] = {
        "eval_loss": evaluation.loss,
        "eval_loss_se": evaluation.loss_se,
        "perplexity": evaluation.perplexity,
        "perplexity_se": evaluation.perplexity_se,
        "masked_accuracy": evaluation.accuracy,
        "test_chunks": chunks,
    }
    if change:
        line += f"; loss {change.loss:+.3f} ± {change.se:.3f} since the start"
        figures |= {"change": change.loss, "change_low": change.low, "change_high": change.high}
    say(line)
    record(run, progress, figures)


def report_if_due(run: Run, progress: Progress, bar: tqdm) -> None:
    """Every `log_every` steps and after the last: loss, learning rate and speed since the last such line."""
    config, step, new = run.config, progress.step, progress.unreported
    if not new.masked_tokens or (step % config.log_every and step != config.max_steps):
        return
    train_loss = new.loss / new.masked_tokens
    learning_rate = learning_rate_at(step - 1, config)
    tokens_per_s = new.tokens / new.seconds
    left = tqdm.format_interval(time_left(run, progress, new.seconds / new.steps).seconds)
    say(
        f"step {step}/{config.max_steps}, epoch {step / run.steps_per_epoch:.2f}: loss {train_loss:.3f}, "
        f"perplexity {figure(perplexity(train_loss))}, lr {learning_rate:.2e}, {tokens_per_s:,.0f} tokens/s, "
        f"{left} left"
    )
    bar.set_postfix_str(f"{left} left, loss {train_loss:.3f}")
    record(run, progress, {"train_loss": train_loss, "lr": learning_rate, "tokens_per_s": tokens_per_s})
    progress.unreported = Unreported()


def describe_divergence(run: Run, progress: Progress, ending: Ending) -> str:
    """What went wrong, the setting to change, and where the last finite weights are: in a checkpoint, and in best/."""
    what = f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, had no finite loss and gradient"
    if ending is Ending.BROKEN:
        what = f"the weights after step {progress.step} are not finite"
    rate = f"most often {run.config.learning_rate:g} is too high. Begin a new run with a lower one"
    lines = [f"learning_rate: {what}; {rate}"]
    if run.pace.saved_step is not None:
        lines.append(f"  the last finite weights are in {checkpoint_path(run.folder, run.pace.saved_step)}")
    if progress.best_loss is not None:
        lines.append(f"  those with the lowest test loss are in {run.folder / 'best'}")
    return "\n".join(lines)
