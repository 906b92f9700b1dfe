"""The state of a run: all that changes while training, how it comes out of a checkpoint and goes into one."""
from dataclasses import asdict, replace

import torch

from common import UserError
from data import Cursor, Part
from model import TRM, Carry, build, flops, parts_that_fit, train_bytes
from optim import AdamATan2, Flat

NOT_SAVED = ("resume", "max_steps", "max_minutes", "device", "dist_timeout", "allow_cpu")   # of this start


def chunks(kind, flat):
    """The list of NamedTuples `kind` whose fields, one after the other, are `flat`."""
    n = len(kind._fields)
    return [kind(*flat[i:i + n]) for i in range(0, len(flat), n)]


class Run:
    """All that changes while training: weights, optimizers, EMA, carry, counters, where the data stand."""

    def __init__(self, args, cfg, world, state=None, parts=None):
        """parts: of every batch, see data.parts_of; by default it is in one piece."""
        self.args, self.cfg, self.world = args, cfg, world
        self.parts = parts or [Part(0, None, args.global_batch_size)]
        model = build(cfg, state) if state else TRM(cfg, torch.Generator().manual_seed(args.seed))
        self.model = model.to(world.device).train()
        self.model.requires_grad_(not args.freeze_weights)
        self.flat = Flat(self.model)
        self.adam = AdamATan2(self.flat.data, args.beta1, args.beta2, args.weight_decay)
        self.ema = self.flat.data.clone() if args.ema else None
        self.rows = args.global_batch_size // world.size            # of this rank
        self.rows_of = [part.rows // world.size for part in self.parts]     # likewise, in every part
        self.at_once = [rows // (args.grad_accum or 1) for rows in self.rows_of]    # through the model
        self.delta = torch.zeros(self.rows, cfg.puzzle_emb_ndim, device=world.device, requires_grad=True)
        self.delta.grad = torch.zeros_like(self.delta)              # without puzzle positions none comes
        self.carries = None                                         # of the parts, made with the first batch
        self.max_steps = torch.tensor(args.halt_max_steps, dtype=torch.int32, device=world.device)
        self.sums, self.health = {}, torch.zeros((), device=world.device)    # since the last log line
        self.cursors, self.step, self.train_s = [Cursor() for _ in self.parts], 0, 0.0
        self.logged_step, self.logged_s = 0, 0.0
        self.data, self.total_steps, self.epoch_rows = {}, 0, 1     # of its data: see open_run

    @property
    def epoch(self):
        return self.step * self.args.global_batch_size / self.epoch_rows

    @property
    def ends_iteration(self):
        """Whether the data of the first part do, which says when to evaluate."""
        return self.cursors[0].rng is None or self.step == self.total_steps

    def config_of(self, part):
        """The Config whose length is that of a part."""
        return replace(self.cfg, seq_len=part.side ** 2) if part.side else self.cfg

    @property
    def step_flops(self):
        """FLOPs of one step on all ranks."""
        return sum(part.rows * flops(self.config_of(part)).step for part in self.parts)

    def tensors(self):
        """{name: tensor} of what every rank holds alike."""
        average = {} if self.ema is None else {"ema": self.ema}
        return {"data": self.flat.data, "m": self.adam.m, "v": self.adam.v, **average, "y0": self.model.y0,
                "z0": self.model.z0, "puzzle_emb": self.model.puzzle_emb}

    def restore(self, checkpoint):
        """Everything of a checkpoint, which rank 0 has, but the weights, which its constructor took; the
        other ranks get what they need from there."""
        if self.world.rank == 0:
            for name in ("m", "v", "ema"):
                vector = self.tensors().get(name)
                if vector is not None and checkpoint[name] is not None:
                    for key, view in self.flat.views(vector).items():
                        view.copy_(checkpoint[name][key])
        for tensor in self.tensors().values():
            self.world.broadcast(tensor)
        tensors = checkpoint.get("carry") if checkpoint else None
        counters = checkpoint and (checkpoint["step"], checkpoint["train_s"], checkpoint["cursor"],
                                   tensors and [(t.shape, t.dtype) for t in tensors])
        self.step, self.train_s, cursors, kinds = self.world.gather_objects(counters)[0]
        self.cursors = chunks(Cursor, cursors)
        self.logged_step, self.logged_s = self.step, self.train_s   # a save writes a log line, too
        mine = []
        for i, (shape, dtype) in enumerate(kinds or ()):     # slots of a part in order, rank by rank
            number = i // len(Carry._fields)
            if shape[0] != self.parts[number].rows:
                raise UserError(f"the canvases of this run have other rows on {self.world.size} ranks; take "
                                f"as many as before, or 1, 2, 4 or 8")
            held = torch.empty(self.rows_of[number], *shape[1:], dtype=dtype, device=self.world.device)
            mine.append(self.world.scatter(held, tensors and tensors[i]))
        self.carries = chunks(Carry, mine) or None

    def checkpoint(self):
        """The content of a checkpoint file on rank 0, None elsewhere. A collective: every rank calls it."""
        # one at a time leaves the device: they are large
        carry = [self.world.gather_on_first(t) for carry in self.carries or () for t in carry]
        if self.world.rank:
            return None

        def by_name(vector):
            return None if vector is None else {k: v.cpu() for k, v in self.flat.views(vector).items()}
        kept = {k: v for k, v in vars(self.args).items() if k not in NOT_SAVED}
        return {"config": asdict(self.cfg), "model": {k: v.cpu() for k, v in self.model.state_dict().items()},
                "ema": by_name(self.ema), "m": by_name(self.adam.m), "v": by_name(self.adam.v),
                "carry": carry or None, "cursor": [x for c in self.cursors for x in c], "step": self.step,
                "epoch": self.epoch,
                "train_s": self.train_s, **self.data, "torch": str(torch.__version__), "settings": kept}

    def fit(self, free):
        """Cut the parts, each into as few pieces as a GPU with `free` bytes can train. Raises UserError."""
        sizes = [(self.config_of(part), rows) for part, rows in zip(self.parts, self.rows_of)]
        carries = [train_bytes(cfg, rows, 0) - train_bytes(cfg, 0, 0) for cfg, rows in sizes]
        for i, (cfg, rows) in enumerate(sizes):
            pieces = parts_that_fit(cfg, rows, free - sum(carries) + carries[i])
            self.at_once[i] = rows // self.world.agree(pieces)      # as many as the fullest GPU needs

    def with_ema(self):
        """Swap the averaged weights in (and, called again, out)."""
        if self.ema is not None:
            held = self.flat.data.clone()
            self.flat.data.copy_(self.ema)
            self.ema.copy_(held)
