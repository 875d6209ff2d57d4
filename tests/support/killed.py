"""Kill training runs at moments that a seed chooses, and resume them until they end.

`python killed.py <list of settings as JSON>`; a setting has a folder, the arguments of train.py, the arguments added on
resuming, a seed and a number of kills. The first run, `whole`, is not killed and records its moments: hooks of training,
the drawing and measuring of samples, and every access to a file below the run folder. The other runs, `run_<n>`, are
killed by SIGKILL at one moment after another. The kills and runs of every setting are printed as JSON.

One setting runs per core. Every attempt is a forked process, which has all imports. Lightning starts further ranks by
calling this script again; an environment variable holds their task.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.commands import cli
from consistency.commands import train as run
from consistency.evaluation.extractors import digits_classifier
from consistency.inference import plots
from consistency.training import build
from consistency.training.callbacks import evaluation, sample_grids

TASK = "KILLED_TASK"
HOOKS = (
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_end",
)
FILES = ("open", "os.rename", "os.remove", "os.truncate")
IN_A_ROW = 4
"""The most kills of one run."""


class Moment(NamedTuple):
    """The `number`-th event `name` at an optimizer step (-1 before the first) on a rank."""

    step: int
    rank: int
    name: str
    number: int

    @property
    def kind(self) -> str:
        """The kind of event: a hook, a file, or a result (samples, measures, curves)."""
        first = self.name.split()[0]
        return "file" if first in FILES else "hook" if first in HOOKS else "result"


class Moments(Callback):
    """A callback that records every moment of its process and kills it at one of them."""

    def __init__(self, output: str, die: list[Any] | None) -> None:
        self.output, self.die = output, None if die is None else Moment(*die)
        self.rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.step, self.seen = -1, list[Moment]()
        self.counts: Counter[tuple[int, str]] = Counter()

    def note(self, name: str) -> None:
        """Record a moment; kill the process if it is the chosen one."""
        self.counts[self.step, name] += 1
        self.seen.append(Moment(self.step, self.rank, name, self.counts[self.step, name]))
        if self.seen[-1] == self.die:
            with open(f"{self.output}.deaths", "a") as file:
                file.write(f"{self.die}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record file accesses: Python calls this hook before each."""
        if event in FILES and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(f"{self.output}/"):
                name = f"{event} {path.removeprefix(self.output)}"
                if event == "open" and path.endswith(".ckpt.part") and self._dies_at(name):
                    os.truncate(path, os.path.getsize(path) // 2)  # died while it was written
                self.note(name)

    def _dies_at(self, name: str) -> bool:
        return self.die == Moment(self.step, self.rank, name, self.counts[self.step, name] + 1)

    def noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to record a moment before each call."""

        def call(*arguments: Any, **settings: Any) -> Any:
            self.note(name)
            return function(*arguments, **settings)

        return call


def _hook(name: str) -> Callable[..., None]:
    def hook(self: Moments, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step
        self.note(name)

    return hook


for _name in HOOKS:
    setattr(Moments, _name, _hook(_name))


def train(output: str, die: list[Any] | None) -> None:
    """Train as src/train.py does, and write the moments beside the run folder."""
    moments, callbacks = Moments(output, die), build.build_callbacks
    build.build_callbacks = lambda config: [*callbacks(config), moments]
    evaluation.generate = moments.noted("measuring samples", evaluation.generate)
    sample_grids.samples = moments.noted("drawing samples", sample_grids.samples)
    # Slow, and nothing of it is compared.
    plots.draw_curves = moments.noted("drawing curves", lambda metrics, picture: None)
    sys.addaudithook(moments.audit)
    cli.run("train", run.train)
    Path(f"{output}.moments_{moments.rank}").write_text(json.dumps(moments.seen))


def attempt(output: Path, arguments: list[str], die: Moment | None) -> bool:
    """Train in a forked process; return whether it ended. Raise `RuntimeError` if it failed instead of being killed."""
    log, deaths = Path(f"{output}.log"), Path(f"{output}.deaths")
    before = deaths.read_text() if deaths.exists() else ""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY), stream)
            os.environ[TASK] = json.dumps([str(output), die])
            sys.argv = [__file__, *arguments]
            train(str(output), None if die is None else list(die))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        return True
    if deaths.exists() and deaths.read_text() != before:
        return False
    raise RuntimeError(f"{' '.join(arguments)} failed:\n{log.read_text()[-5000:]}")


def chosen(moments: list[Moment], count: int, draw: random.Random) -> list[Moment]:
    """Choose `count` moments, in order: first a kind, then a name, then a moment, each uniformly."""
    picked = []
    for _ in range(count):
        kind = draw.choice(sorted({m.kind for m in moments}))
        name = draw.choice(sorted({m.name for m in moments if m.kind == kind}))
        picked.append(draw.choice([m for m in moments if m.name == name]))
    return sorted(picked, key=moments.index)


def survive(
    folder: str, arguments: list[str], resumed: list[str], seed: int, kills: int
) -> dict[str, Any]:
    """Run one setting without kills, then in further runs with `kills` kills in total."""
    whole = Path(folder) / "whole"
    attempt(whole, [*arguments, f"output={whole}"], None)
    moments = sorted(
        (
            Moment(*m)
            for f in sorted(Path(folder).glob("whole.moments_*"))
            for m in json.loads(f.read_text())
        ),
        key=lambda moment: moment.step,
    )
    draw, runs, dead = random.Random(seed), [], list[str]()
    while len(dead) < kills:
        output = Path(folder) / f"run_{len(runs)}"
        runs.append(str(output))
        for die in [*chosen(moments, min(IN_A_ROW, kills - len(dead)), draw), None]:
            given = [*arguments, f"output={output}", "resume=auto"]
            if (output / "config.yaml").is_file():
                given = [*draw.choice([given, [f"resume={output}"]]), *resumed]
            if attempt(output, given, die):
                break
        deaths = Path(f"{output}.deaths")
        dead += deaths.read_text().splitlines() if deaths.exists() else []
        if len(runs) > 3 * kills:
            raise RuntimeError(f"{len(dead)} kills in {len(runs)} runs: the moments do not come")
    return {"whole": str(whole), "runs": runs, "kills": dead}


if __name__ == "__main__":
    if TASK in os.environ:
        train(*json.loads(os.environ[TASK]))
    else:
        digits_classifier()  # trained once, for all
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            jobs = [pool.submit(survive, **setting) for setting in json.loads(sys.argv[1])]
            print(json.dumps([job.result() for job in jobs]))
