"""A progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time

from tqdm import tqdm

from support.processes import RANK


class Progress:
    """tqdm's bar on a terminal, elsewhere a line for every tenth of the work."""

    def __init__(self, total, label, start=0):
        self.total, self.label, self.done = total, label, start
        self.began = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and RANK == 0:
            self.bar = tqdm(total=total, desc=label, initial=start, leave=False, dynamic_ncols=True)

    def update(self, **numbers):
        """One step is done; `numbers` are shown beside it."""
        tenths_before = self.done * 10 // self.total
        self.done += 1
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
            if self.done == self.total:
                self.bar.close()
        elif RANK == 0 and self.done * 10 // self.total > tenths_before:
            seconds = time.monotonic() - self.began
            line = f"{self.label}: {self.done}/{self.total}  {text}  {seconds:.0f} s"
            with contextlib.suppress(OSError):  # a log on a full disk must not end the work
                print(line, file=sys.stderr, flush=True)
