"""Where a model looks: the attention of words, and of the answer, to the patches of the image.

Legend: S blocks, N tokens of a joint pass (class token, patches, text), W words, R x C patches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eve_ds.model.block import Attention
from eve_ds.tasks import Task
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from eve_ds.predict.eve import EVE
    from eve_ds.predict.raw_inputs import ImageInput


class AttentionMaps(NamedTuple):
    """Attention of a text and of the answer to the patches of an image, averaged over heads, for each block.

    A value is the share of the attention that one patch gets, from 0 to 1. What the patches of a map lack to 1 goes to
    the class token and to the text.

    Attributes:
        words: W, in their order, without [CLS] and [SEP]; those beyond the model's length are not there.
        of_word: [S, W, R, C] float32, the mean over the word's tokens; row 0 of the patches is the image's top.
        of_answer: [S, R, C] float32, of the first text token, which the heads read: for the answer to a question,
            whether image and text match, whether a statement is true. None with NLVR's bi-attention head, which reads
            all tokens.
    """

    words: list[str]
    of_word: np.ndarray
    of_answer: np.ndarray | None


def attention_maps(eve: EVE, image: ImageInput, text: str, name: str | None) -> AttentionMaps:
    """What ``EVE.attention`` gives."""
    name = name or eve.tasks[0]
    task = eve.task(name)
    ids, mask = eve.tokens([text])
    weights = attention_weights(task, eve.pixels([image]), ids, mask)
    side = eve.config.image_size // eve.config.patch_size
    first = 1 + side * side  # of the text
    to_patches = weights[:, first:, 1:first].unflatten(2, (side, side)).numpy()
    words = words_of(eve.tokenizer, ids[0].tolist())
    of_word = [to_patches[:, start:stop].mean(axis=1) for _, start, stop in words]
    of_answer = None if getattr(task, "biattn", False) else to_patches[:, 0]
    shape = (len(weights), 0, side, side)
    joined = np.stack(of_word, axis=1) if of_word else np.zeros(shape, np.float32)
    return AttentionMaps([word for word, _, _ in words], joined, of_answer)


@torch.inference_mode()
def attention_weights(task: Task, pixels: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Attention in a joint pass of one image and one text, averaged over heads: [S, N, N] float32 on the CPU.

    Row i of a block tells how token i distributes its attention, and adds up to 1. As in ``plain_attention``:
    softmax(q k' / sqrt(d) + bias), from what each attention layer is given in the pass.

    Args:
        pixels: [1, 3, H, W] float32, on the model's device, as all.
        text_ids, text_mask: [1, L] int64 and bool.
    """
    found: list[Tensor] = []

    def note(layer: Attention, inputs: tuple[Tensor, Tensor | None]) -> None:
        x, bias = inputs
        batch, tokens, dim = x.shape
        qkv = layer.qkv(x).view(batch, tokens, 3, layer.num_heads, dim // layer.num_heads)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).float().unbind(0)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        found.append(scores.softmax(dim=-1).mean(dim=1)[0].cpu())

    hooks = [block.attention.register_forward_pre_hook(note) for block in task.backbone.blocks]  # type: ignore[union-attr]
    try:
        task.encode(pixels, text_ids, text_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def words_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """Words of a text's ids, [CLS] and [SEP] left out: each with the places of its first token and after its last."""
    last = len(ids) - 1
    continues = _continues(tokenizer)
    ends = [place for place in range(2, last) if not continues[ids[place]]]
    words = []
    start = 1
    for stop in [*ends, last]:
        own = ids[start:stop]
        text = "".join(tokenizer.tokens(own)) if tokenizer.unk_id in own else tokenizer.decode(own)
        if text:  # else a mark where a word begins, as a token of its own: it belongs to what follows
            words.append((text, start, stop))
            start = stop
    return words


@functools.lru_cache(maxsize=8)
def _continues(tokenizer: Tokenizer) -> list[bool]:
    """Whether an entry belongs to the word of the token before it; where the tokenizer does not tell, none does."""
    try:
        return tokenizer.continues_word()
    except UserError:
        return [False] * tokenizer.vocab_size
