"""Law 3, checked at every start: packed, the model at hand computes what it computes of each line by itself."""

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mlm.data.chunks import Chunks, take
from mlm.data.micro_batches import MicroBatcher
from mlm.data.packing import Sequences, frame
from mlm.data.tokenizer import Vocabulary
from mlm.encoder.packed import PackedEncoder
from mlm.errors import UserError

SAMPLED_CHUNKS = 256  # of which the longest is checked, between two others
LONGEST_SAMPLE = 96  # tokens of the longest, unless a window is larger
OF_OTHERS = 24  # tokens
# The largest difference between outputs, as a share of their standard deviation, that rounding explains: it was 1e-7 to
# 1e-6 in float32 and 0.01 in bfloat16; a window that is off by one made 4e-4 with random weights, all else more.
TOLERANCE, TOLERANCE_IN_16_BITS = 2e-4, 0.05


def sample(chunks: Chunks, vocabulary: Vocabulary, encoder: PackedEncoder) -> Sequences:
    """Returns three chunks of the text: the longest of some, in part, between two shorter ones. The first tokens of
    that one are masked, so that it has another share of them than the others."""
    number = min(SAMPLED_CHUNKS, len(chunks))
    longest = int(np.diff(chunks.offsets[: number + 1]).argmax())
    widest = max(LONGEST_SAMPLE, *(2 * (window or 0) for window in encoder.windows))
    parts = []
    for index, most in ((0, OF_OTHERS), (longest, widest), (number - 1, OF_OTHERS)):
        parts.append(take(chunks, np.array([index]))[0][:most])
    lengths, tokens = np.array(list(map(len, parts))), np.concatenate(parts)
    inputs = tokens.copy()
    inputs[lengths[0] :][: max(1, lengths[1] // 4)] = vocabulary.mask_id
    return frame(inputs, np.arange(len(tokens)), tokens, lengths, vocabulary)


def refuse_differences(
    encoder: PackedEncoder, chunks: Sequences, micro_batcher: MicroBatcher, accelerator: Accelerator, name: str
) -> None:
    """Raises UserError where an encoder, on its device, makes something else of packed chunks than its own class makes
    of each by itself: by rows with a mask, in float32, and as `micro_batcher` feeds it. name: the setting and value.
    """
    by_mask = replace(micro_batcher, varlen=False, max_positions=1 << 30)
    is_exact = accelerator.device.type == "cpu" or not torch.backends.cuda.matmul.allow_tf32
    differences = [(difference(encoder, chunks, by_mask), TOLERANCE if is_exact else TOLERANCE_IN_16_BITS)]
    if micro_batcher.varlen:
        with accelerator.autocast():
            differences.append((difference(encoder, chunks, micro_batcher), TOLERANCE_IN_16_BITS))
    for found, tolerance in differences:
        if not found <= tolerance:
            raise UserError(
                f"{name} does not compute of packed lines what it computes of each by itself (on a sample of the text "
                f"its outputs are off by {found:.2g} of their spread), so it cannot be used here"
            )


@torch.no_grad()
def difference(encoder: PackedEncoder, chunks: Sequences, micro_batcher: MicroBatcher) -> float:
    """Returns by how much the outputs of packed chunks differ from those of the model's own class on padded chunks: the
    root mean square of the difference, as a share of the outputs' standard deviation."""
    was_training, device = encoder.training, micro_batcher.device
    encoder.eval()
    everywhere = np.arange(len(chunks.input_ids))
    packed = chunks._replace(label_positions=everywhere, targets=everywhere)
    expected = _by_own_class(encoder, chunks, micro_batcher.vocabulary, device)  # (positions, features)
    found = torch.empty_like(expected)
    for inputs, places in micro_batcher(packed):
        found[places] = type(encoder).forward(encoder, **inputs).float()  # as no wrapper of `forward` would have it
    encoder.train(was_training)
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


def _by_own_class(encoder: PackedEncoder, chunks: Sequences, vocabulary: Vocabulary, device: torch.device) -> Tensor:
    """Returns what the model's own class makes of the chunks, one a row and padded, at all of their positions."""
    is_token = np.arange(chunks.lengths.max()) < chunks.lengths[:, None]  # (n, longest)
    input_ids = np.full(is_token.shape, vocabulary.pad_id)
    input_ids[is_token] = chunks.input_ids
    ids, is_token_here = (torch.from_numpy(array).to(device) for array in (input_ids, is_token))
    encoder.model.set_attn_implementation("sdpa")
    try:
        output = encoder.model(input_ids=ids, attention_mask=is_token_here.long())
    finally:
        encoder.model.set_attn_implementation("packed")
    return (output.logits if "logits" in output else output.last_hidden_state)[is_token_here].float()
