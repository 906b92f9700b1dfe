"""The optimizers: AdamATan2 on all weights at once, SignSGD on the rows of the puzzle table, the schedule of
their rates. """
import math

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Flat:
    """All parameters of a model in one float32 vector and their gradients in another, so that an optimizer
    step, an all-reduce or an average is one operation. The parameters become views of it."""

    def __init__(self, model):
        # the largest first: sizes fall from multiples of 16 bytes, which kernels like to start at
        self.params = dict(sorted(model.named_parameters(), key=lambda item: -item[1].numel()))
        self.data = parameters_to_vector(self.params.values()).detach()
        self.grad = torch.zeros_like(self.data)
        vector_to_parameters(self.data, self.params.values())
        for name, view in self.views(self.grad).items():
            self.params[name].grad = view

    def views(self, vector):
        """{parameter name: its part of a vector of this layout}"""
        parts = vector.split([p.numel() for p in self.params.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.params.items(), parts)}


class AdamATan2:
    """Adam with atan2 in place of the division by sqrt(v) + eps (arXiv 2407.05872), on a flat vector.

    The first moment's bias correction stands outside the atan2, as in the published training code."""

    def __init__(self, like, beta1, beta2, weight_decay):
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay

    def step(self, p, grad, lr, t):
        """Update p in place from its gradient; t counts from 1."""
        p.mul_(1 - lr * self.weight_decay)
        self.m.lerp_(grad, 1 - self.beta1)
        self.v.lerp_(grad.square(), 1 - self.beta2)
        denominator = self.v.sqrt().div_(math.sqrt(1 - self.beta2 ** t))
        p.add_(torch.atan2(self.m, denominator), alpha=-lr / (1 - self.beta1 ** t))


def sign_sgd(table, ids, grads, lr, weight_decay):
    """SignSGD with weight decay on the rows `ids` of the puzzle table, in place.

    ids (G,), grads (G, ndim) of the global batch; gradients of the same puzzle are summed by a product, not
    by index_add_, whose atomics on CUDA add in any order; in float64, so that no order changes a sign
    (float32 on Apple's MPS, which lacks it). Static shapes, no host synchronisation; duplicates write equal
    rows. """
    ids, wide = ids.long(), torch.float32 if grads.device.type == "mps" else torch.float64
    total = (ids[:, None] == ids).to(wide) @ grads.to(wide)                          # (G, ndim)
    table.index_copy_(0, ids, table[ids] * (1 - lr * weight_decay) - lr * total.sign().float())


def schedule(step, total_steps, warmup, min_ratio):
    """Factor of the learning rate at a step, counted from 1: linear warm-up, then cosine down to
    min_ratio."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
