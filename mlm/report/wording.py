"""Sentences and tables about a run, for its log, its page and its model card."""

import math
from typing import Any

from Config import Config
from mlm.data.chunks import Corpus
from mlm.data.text_stats import SHOWN_SPLIT_WORDS, describe_equal_lines, text_warnings, used_splits
from mlm.data.words import MANY_SUBWORDS
from mlm.evaluation.loss import Change, Evaluation, perplexity
from mlm.report.summary import Summary
from mlm.settings import describe_settings
from mlm.terminal import figure, render, table, with_error
from mlm.training.checkpoint import checkpoint_path
from mlm.training.plan import SAMPLE_ERROR, Plan
from mlm.training.progress import Progress
from mlm.training.run import Ending, Setup


def verdict(summary: Summary) -> str:
    """Returns a sentence: whether the model guesses the test text better than the baseline that it started from."""
    last = summary.evaluations[-1]
    if summary.settings["evaluate_only"]:
        return "Not trained: these are the scores of the model as it is."
    if not summary.has_trained:
        return "Not evaluated yet since training began: these are the scores of the starting model."
    return describe_change(last["change"], last["change_low"], last["change_high"], "fell", "rose")


def describe_change(loss: float, low: float, high: float, fell: str, rose: str) -> str:
    """Returns a sentence on a change of the test loss and its 95% interval: better, worse, or that it cannot tell."""
    if not math.isfinite(loss):
        return "Worse: the test loss is not finite; training diverged."
    if not math.isfinite(low):
        return (
            "Cannot tell: the chunks that were scored are of one line, which gives no standard error; score more text."
        )
    if low == high == 0:
        return "Equal: the loss is the same on every chunk of the test text."
    unit = "nats per masked token (95% interval"
    if high < 0:
        return f"Better: the test loss {fell} by {-loss:.3f} {unit} {-high:.3f} to {-low:.3f})."
    if low > 0:
        return f"Worse: the test loss {rose} by {loss:.3f} {unit} {low:.3f} to {high:.3f})."
    return f"Cannot tell: the test loss changed by {loss:+.3f} {unit} {low:+.3f} to {high:+.3f})."


def trend(summary: Summary) -> str:
    """Returns a sentence: whether the test loss still falls; empty where too few evaluations were made to say. The last
    evaluation is compared with the best before it, whose model best/ holds unless the last is better."""
    last = summary.evaluations[-1]
    if not math.isfinite(last.get("trend_low", -math.inf)):
        return ""
    change, low, high = last["trend"], last["trend_low"], last["trend_high"]
    best = f"{last['best_step']:,.0f}"
    if low > 0:
        return (
            f"It was lowest after step {best}, and has risen by {change:.3f} since (95% interval {low:.3f} to "
            f"{high:.3f}); best/ holds that model."
        )
    if high < 0:
        fell = f"fell, by {-change:.3f} since step {best} (95% interval {-high:.3f} to {-low:.3f})"
        if summary.stops_early:
            return f"It {fell}, while the learning rate fell."
        return f"It still {fell}: more epochs may lower it further{_how_to_extend(summary)}."
    interval = f"(95% interval {low:+.3f} to {high:+.3f})"
    if low > -SAMPLE_ERROR:
        if last["step"] - last["best_step"] < summary.settings["eval_every"] / 2:
            return ""  # too few steps to tell
        return f"It no longer fell since step {best} {interval}: more epochs on this text will hardly help."
    return f"Cannot tell whether it still falls: since step {best} it changed by {change:+.3f} {interval}."


def _how_to_extend(summary: Summary) -> str:
    """Returns the flags that give a run with a constant learning rate more epochs; nothing for others."""
    if summary.settings["schedule"] != "constant":
        return ""
    settings, epoch_steps = summary.settings, summary.derived["steps_per_epoch"]
    decides = "num_epochs" if settings["max_steps"] == settings["num_epochs"] * epoch_steps else "max_steps"
    return f", by --resume --run_name {summary.folder.name} and a larger --{decides}"


def early_stop(summary: Summary) -> str:
    """Returns a sentence on why a run ends before it was to; empty where it does not."""
    if not summary.stops_early:
        return ""
    settings, start = summary.settings, summary.cooldown_from
    evaluations = f"{settings['early_stop_evals']} evaluation(s) in a row, up to step {start:,}, saw no sure gain"
    return f"Stopped early: {evaluations}, so {summary.steps:,} of {settings['max_steps']:,} planned steps are trained."


def ignorance(before: float, error: float, unigram: float, vocabulary: float) -> str:
    """Returns a warning where a checkpoint knows nothing of the text, else nothing.

    before, error: its perplexity and the standard error; unigram: the perplexity of word frequencies alone. So it is
    where the lower end of the 95% interval is above that, or above half the size of the vocabulary.
    """
    lowest = before * math.exp(-1.96 * error / before) if math.isfinite(error) else before  # the loss's, as perplexity
    if not lowest >= min(unigram, vocabulary / 2):
        return ""
    reference = f"that of word frequencies alone, {figure(unigram)}"
    if lowest < unigram:
        reference = f"half the size of the vocabulary, {vocabulary:,.0f}: that of a blind guess"
    return (
        f"warning: the start knows nothing of this text: its perplexity, {figure(before)}, is above {reference}. Most "
        "likely its masked-language-model head is missing or random, or the tokenizer is another model's, or the text "
        "is in a language that it never learned."
    )


def forgetting(summary: Summary) -> str:
    """Returns a sentence: whether the model guesses general text worse than the baseline; empty where that was not
    measured, or is not finite."""
    last = summary.evaluations[-1]
    change = last.get("general_change", math.nan)
    if not math.isfinite(change):
        return ""
    low, high = last["general_change_low"], last["general_change_high"]
    if not math.isfinite(low):
        return "Whether anything was forgotten cannot be told: the general text that was scored is one line."
    if low > 0:
        interval = f"(95% interval {low:.3f} to {high:.3f})"
        return f"On general text the loss rose by {change:.3f} nats {interval}: that much was forgotten."
    if high < 0:
        return f"On general text the loss fell by {-change:.3f} nats (95% interval {-high:.3f} to {-low:.3f})."
    interval = f"{change:+.3f} nats (95% interval {low:+.3f} to {high:+.3f})"
    return f"Whether anything was forgotten cannot be told: on general text the loss changed by {interval}."


def specificity(domain: float, domain_se: float, general: float, general_se: float) -> str:
    """Returns a sentence: how much harder the domain's text is to the start than general text; empty where that cannot
    be told. By the losses on both before training, in nats per masked token, with their standard errors.

    After the domain specificity of Zheng et al., When Does Pretraining Help? (arXiv 2104.08671), by which gains go.
    Theirs is the difference of two models on one text; before training there is one model, on two texts.
    """
    difference, error = domain - general, math.hypot(domain_se, general_se)  # of independent texts
    if not abs(difference) > 1.96 * error:
        return ""
    harder = "harder to guess than general text, which speaks for training on it"
    easier = "easier to guess than general text, so that little may be left to gain"
    what = harder if difference > 0 else easier
    return f"Domain specificity: {difference:+.3f} ± {error:.3f} nats. To the starting model this text is {what}."


def notes(summary: Summary) -> list[str]:
    """Returns what else to know of the scores: a start that knew nothing, an early stop, the trend of the loss, what
    was forgotten, how special the domain is, and whether word frequencies do as well."""
    unigram, first, last = summary.text.unigram_perplexity, summary.evaluations[0], summary.evaluations[-1]
    vocabulary = summary.derived.get("vocabulary", math.inf)  # which older runs did not write down
    is_checkpoint = not summary.settings["initial_pretrain_model"].startswith("scratch:")  # random weights know nothing
    at_first = ignorance(first["perplexity"], first["perplexity_se"], unigram, vocabulary) if is_checkpoint else ""
    columns = ("eval_loss", "eval_loss_se", "general_loss", "general_loss_se")
    is_told = is_checkpoint and "general_loss" in first
    special = specificity(*(first[column] for column in columns)) if is_told else ""
    all_notes = (at_first, early_stop(summary), trend(summary), forgetting(summary), special)
    found = [sentence for sentence in all_notes if sentence]
    error = last["perplexity_se"] if math.isfinite(last["perplexity_se"]) else 0.0
    if summary.has_trained and not last["perplexity"] + 1.96 * error < unigram:  # the end of its 95% interval
        found.append(
            f"Word frequencies alone would reach a perplexity of {figure(unigram)}: it has hardly learned yet what "
            "words tell of each other, and needs more steps or another learning rate."
        )
    return found


def score_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Returns the table of scores: name, before, after, a note. Where nothing has trained, both are the baseline's."""
    both = summary.evaluations[0], summary.evaluations[-1]
    last, unigram = both[-1], summary.text.unigram_perplexity
    tokens_per_character = summary.text.test.tokens / summary.text.test.characters
    divided = ""
    if summary.has_trained and math.isfinite(last["change_low"]):
        factor, least, most = (perplexity(-last[name]) for name in ("change", "change_high", "change_low"))
        divided = f"divided by {figure(factor)} (95%: {figure(least)} to {figure(most)})"
    rows: list[tuple[str, ...]] = [
        ("perplexity", *(with_error(row["perplexity"], row["perplexity_se"]) for row in both), divided),
        ("masked accuracy", *(f"{row['masked_accuracy']:.1%}" for row in both), ""),
        ("nats per character", *(f"{row['eval_loss'] * tokens_per_character:.3f}" for row in both), ""),
    ]
    if not summary.settings["evaluate_only"]:
        share = figure(last["perplexity"] / unigram)
        rows.append(("unigram perplexity", "", figure(unigram), f"perplexity / unigram = {share}"))
    if "general_loss" in last:
        general = [(row["general_perplexity"], row["general_loss_se"]) for row in both]
        rows.append(("general perplexity", *(with_error(of_text, of_text * se) for of_text, se in general), ""))
    return rows


def scored_chunks(summary: Summary) -> str:
    """Returns what the scores are of."""
    first, last = (int(summary.evaluations[place]["test_chunks"]) for place in (0, -1))
    all_chunks = summary.text.test.chunks
    scored = (
        f"{last:,} of {all_chunks:,} chunks of test text" if last < all_chunks else f"all {last:,} chunks of test text"
    )
    if first != last:
        scored += f" ({first:,} before training; the change is on what both scored)"
    general = summary.evaluations[-1].get("general_test_chunks")
    return f"{scored}; the general perplexity on those of {general:,.0f} chunks of general text" if general else scored


def closing_words(summary: Summary) -> str:
    """Returns the end of the log: scores before and after, some hidden words and their guesses, where the model is."""
    rows = score_rows(summary)
    if summary.has_trained:
        scores = table([("", "before", "after"), *rows], "<>><")
    else:  # both scores are the same
        scores = table([(name, score, note) for name, _, score, note in rows], "<><")
    return render(
        "report/templates/closing.txt",
        run=summary,
        scores=scores,
        scored_chunks=scored_chunks(summary),
        verdict=verdict(summary),
        notes=notes(summary),
    )


# -------------------------------------------------------------------------------------- lines of the log


def describe_run(given: Config, config: Config, corpus: Corpus, derived: dict[str, Any]) -> str:
    """Returns settings, what was found in the text, and derived numbers, for people."""
    stats, only_test = corpus.stats, config.evaluate_only
    splits = used_splits(stats, only_test)
    if corpus.general:
        general = used_splits(corpus.general.stats, only_test or not config.general_chunks)
        splits |= {f"general {name}": split for name, split in general.items()}
    return render(
        "report/templates/setup.txt",
        settings=describe_settings(config, given),
        stats=stats,
        equal_lines="" if only_test else describe_equal_lines(stats, config.drop_duplicates),
        splits=splits,
        only_test=only_test,
        many_subwords=MANY_SUBWORDS,
        split_words=stats.split_words[:SHOWN_SPLIT_WORDS],
        warnings=[*corpus.text.notes, *text_warnings(stats, config.initial_pretrain_tokenizer, only_test)],
        added_words=corpus.added_words,
        derived=derived,
    )


def describe_evaluation(
    setup: Setup, corpus: Corpus, step: int, evaluation: Evaluation, change: Change | None, general: Evaluation | None
) -> str:
    """Returns a line of scores with their standard errors, also of general text where there is such, and of how the
    loss changed on the same chunks; before training others where the checkpoint knows nothing of the text, and where
    the domain is special."""
    chunks, test_chunks = len(evaluation.losses), len(corpus.test)
    sample = f"{chunks:,} of {test_chunks:,} chunks" if chunks < test_chunks else "all chunks"
    heading = f"step {step}/{setup.plan.steps}" if step else "before training"
    line = (
        f"{heading}, test ({sample}): perplexity {with_error(evaluation.perplexity, evaluation.perplexity_se)}, "
        f"masked accuracy {evaluation.accuracy:.1%}"
    )
    if change:
        line += f"; loss {change.loss:+.3f} ± {change.se:.3f} from the baseline"
    lines = [line]
    if general:
        lines[0] += f"; general text: perplexity {with_error(general.perplexity, general.perplexity_se)}"
    if not change and not setup.config.scratch_size:
        unigram, vocabulary = corpus.stats.unigram_perplexity, corpus.vocabulary.size
        lines.append(ignorance(evaluation.perplexity, evaluation.perplexity_se, unigram, vocabulary))
        if general:
            lines.append(specificity(evaluation.loss, evaluation.loss_se, general.loss, general.loss_se))
    return "\n".join(filter(None, lines))


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
