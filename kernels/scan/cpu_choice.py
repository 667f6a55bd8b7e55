"""Which tokens of a head are read: the threshold from a sample, and what reaches it."""

from __future__ import annotations

import math

import numpy as np

from ..cpu import compiled
from ..cpu.arithmetic import NONE, exp2
from .cpu_codes import BLOCK
from .operands import OUTWEIGHS

GROUP, MAX, HEAD = 0, 1, 2
"""Whose score counts: the mean of the group's softmaxes, the largest of its logits, or each query's own."""
LEAST_SCORE = np.float32(2.0**-120)
"""The least score of a group's token that is read: below it all scores are alike, because `exp2` ends there."""
OUTWEIGHING = np.float32(OUTWEIGHS)


@compiled()
def thresholds(logits, scores, count, rank, mode, base, threshold):
    """What weights are relative to, base [G], and the score from which tokens are read, threshold [G].

    Args:
        logits: [G, n] of the sample's candidates, the first `count`.
        scores: [n], for what is at work.
        rank: the threshold is the score of the rank-th best of them; 0: no token is read, below 0, and where there are
            fewer: every token.
    """
    group = logits.shape[0]
    base[:], threshold[:] = np.float32(0.0), NONE
    for row in range(group):
        if count:
            most, mass = NONE, 0.0
            for token in range(count):
                most = max(most, logits[row, token])
            for token in range(count):
                mass += exp2(logits[row, token] - most)
            base[row] = most + np.float32(math.log2(mass))
    if rank == 0:
        threshold[:] = -NONE
    if rank < 1 or rank > count:
        return
    if mode == HEAD:
        for row in range(group):
            threshold[row] = largest(logits[row], count, rank)
        return
    for token in range(count):
        scores[token] = exp2(logits[0, token] - base[0]) if mode == GROUP else logits[0, token]
    for row in range(1, group):
        for token in range(count):
            if mode == GROUP:
                scores[token] += exp2(logits[row, token] - base[row])
            else:
                scores[token] = max(scores[token], logits[row, token])
    threshold[:] = max(largest(scores, count, rank), LEAST_SCORE) if mode == GROUP else largest(scores, count, rank)


@compiled()
def largest(numbers, count, rank):
    """The rank-th largest of the first `count` numbers, which are reordered (Hoare's quickselect)."""
    low, high, want = 0, count - 1, rank - 1
    while low < high:
        pivot = numbers[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while numbers[left] > pivot:
                left += 1
            while numbers[right] < pivot:
                right -= 1
            if left <= right:
                numbers[left], numbers[right] = numbers[right], numbers[left]
                left += 1
                right -= 1
        if want > right and want < left:
            break
        if want <= right:
            high = right
        else:
            low = left
    return numbers[want]


@compiled()
def mark_read(logits, at, count, first, begin, base, threshold, mode, score, reads):
    """Mark the block's tokens that are read, reads [G or 1, BLOCK] uint8, and turn logits [G, BLOCK] into weights
    2^(logit - base).

    Args:
        at, count: the block's first token and how many there are.
        first, begin: tokens before `first` and from `begin` are always read.
        score: [G, BLOCK], for what is at work.
    """
    for row in range(len(base)):
        for token in range(BLOCK):
            weight = exp2(logits[row, token] - base[row])
            score[row, token] = weight if mode == GROUP else logits[row, token]
            logits[row, token] = weight
    for row in range(1, len(base)):
        for token in range(BLOCK):
            if mode == GROUP:
                score[0, token] += score[row, token]
            elif mode == MAX:
                score[0, token] = max(score[0, token], score[row, token])
    for mark in range(len(reads)):
        for token in range(BLOCK):
            reads[mark, token] = score[mark, token] >= threshold[mark]
        for row in range(mark if mode == HEAD else 0, mark + 1 if mode == HEAD else len(base)):
            for token in range(BLOCK):
                reads[mark, token] |= logits[row, token] > OUTWEIGHING
        for token in range(0, min(first - at, count)):
            reads[mark, token] = 1
        for token in range(max(begin - at, 0), count):
            reads[mark, token] = 1
        for token in range(count, BLOCK):
            reads[mark, token] = 0
