"""Deliberate errors, each of which a test must notice: `python tests/tools/mutations.py [name ...]`.

The errors are those that others have made. Each is planted in a copy of the repository, where the fast tests of the core
run until one fails; the table names it. Ends with status 1 if an error goes unnoticed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("src", "conf", "tests", "experiments", "pyproject.toml")
SOURCE = "src/consistency"


@dataclass(frozen=True)
class Mutation:
    """A replacement of `before` by `after` in `file`."""

    name: str
    file: str
    before: str
    after: str


WEIGHTED = (
    "        return Losses(self.weighting(t, r) * self.distance(estimate, reference), t, r)\n"
)
CLEAN = "torch.where(broadcast_time(clean, x_0), x_0, reference)\n"
STUDENT = "slope\n        estimate = online(x_t, t, label)\n"
"""The same line in two objectives, and the ends of the lines above it."""

MUTATIONS = [
    Mutation(
        "pseudo-Huber pixel by pixel",
        f"{SOURCE}/distances.py",
        "((x - y).square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c",
        "(((x - y).square() + c**2).sqrt() - c).sum(dim=(1, 2, 3))",
    ),
    Mutation(
        "no c_in",
        f"{SOURCE}/denoiser.py",
        "x = broadcast_time(c.c_in, x_t) * x_t",
        "x = x_t",
    ),
    Mutation(
        "no c_noise",
        f"{SOURCE}/denoiser.py",
        "self.network(x, c.c_noise, label, ",
        "self.network(x, t, label, ",
    ),
    Mutation(
        "estimates clamped in training",
        f"{SOURCE}/objectives.py",
        f"{CLEAN}{WEIGHTED}",
        f"{CLEAN}{WEIGHTED.replace('(estimate', '(estimate.clamp(-1, 1)')}",
    ),
    Mutation(
        "c_out without -t_min",
        f"{SOURCE}/preconditioning.py",
        "c_out=gap * self.sigma_data",
        "c_out=t * self.sigma_data",
    ),
    Mutation(
        "c_skip of a denoiser in a consistency function",
        f"{SOURCE}/preconditioning.py",
        "(gap**2 + self.sigma_data**2)",
        "(t**2 + self.sigma_data**2)",
    ),
    Mutation(
        "time input of another network",
        "conf/model/adm_lsun256.yaml",
        "c_noise_scale: 250.0",
        "c_noise_scale: 0.25",
    ),
    Mutation(
        "dropout drawn anew in the second pass",
        f"{SOURCE}/randomness.py",
        "                torch.set_rng_state(self.state)\n            yield",
        "                pass\n            yield",
    ),
    Mutation(
        "mu of N(k) instead of N(k) - 1",
        f"{SOURCE}/schedules.py",
        "math.log(mu_0) / (num_scales - 1))",
        "math.log(mu_0) / num_scales)",
    ),
    Mutation(
        "N(k) one step ahead",
        f"{SOURCE}/schedules.py",
        "root = math.sqrt(max(k / total_steps",
        "root = math.sqrt(max((k + 1) / total_steps",
    ),
    Mutation(
        "weight at the cleaner time",
        f"{SOURCE}/objectives.py",
        f"{CLEAN}{WEIGHTED}",
        f"{CLEAN}{WEIGHTED.replace('(t, r)', '(r, r)')}",
    ),
    Mutation(
        "weight at the cleaner time in progressive distillation",
        f"{SOURCE}/objectives.py",
        f"{STUDENT}{WEIGHTED}",
        f"{STUDENT}{WEIGHTED.replace('(t, r)', '(r, r)')}",
    ),
    Mutation(
        "target updated before the optimizer",
        f"{SOURCE}/training/callbacks/ema.py",
        "module.after_each_step(step, undo)",
        "trainer.optimizers[0].register_step_pre_hook(lambda *_: step(0))",
    ),
    Mutation(
        "no stop-gradient",
        f"{SOURCE}/objectives.py",
        "with torch.set_grad_enabled(not self.stop_gradient), dropout",
        "with torch.enable_grad(), dropout",
    ),
    Mutation(
        "teacher in train mode",
        f"{SOURCE}/steps.py",
        "return super().train(False)",
        "return super().train(mode)",
    ),
    Mutation(
        "average pooling in the wrong LPIPS",
        f"{SOURCE}/training/lpips.py",
        'if variant == "average_pooled_unit"',
        'if variant == "max_pooled_signed"',
    ),
    Mutation(
        "grid with one point more",
        f"{SOURCE}/pairs.py",
        "torch.randint(num_scales - 1, (batch,)",
        "torch.randint(num_scales, (batch,)",
    ),
    Mutation(
        "Heun's second slope at the first point",
        f"{SOURCE}/solvers.py",
        "pf_ode(denoise, x + step * d, r, label)",
        "pf_ode(denoise, x, r, label)",
    ),
    Mutation(
        "tangent against the flow",
        f"{SOURCE}/tangents.py",
        "(v, rate)",
        "(v, -rate)",
    ),
    Mutation(
        "renewed noise of deviation t",
        f"{SOURCE}/samplers.py",
        "at((t**2 - t_min**2) ** 0.5, x_0)",
        "at(t, x_0)",
    ),
    Mutation(
        "indices evaluated to the last",
        f"{SOURCE}/samplers.py",
        "torch.tensor(indices[:-1])",
        "torch.tensor(indices)",
    ),
    Mutation(
        "churn without its noise",
        f"{SOURCE}/samplers.py",
        "variance_exploding(x, s_noise * z, at((t_hat**2 - t**2) ** 0.5, x)), t_hat",
        "x, t_hat",
    ),
    Mutation(
        "churn without a bound",
        f"{SOURCE}/samplers.py",
        "gamma = min(share, math.sqrt(2) - 1)",
        "gamma = min(share, 1.0)",
    ),
    Mutation(
        "ancestral noise up to the level left",
        f"{SOURCE}/samplers.py",
        "r * (1 - (r / t) ** 2).sqrt()",
        "(t**2 - r**2).sqrt()",
    ),
    Mutation(
        "estimates clipped at the end alone",
        f"{SOURCE}/samplers.py",
        "return clipped if clip else denoise",
        "return denoise",
    ),
    Mutation(
        "known and free exchanged",
        f"{SOURCE}/editing.py",
        "a(y) * (1 - omega) + a(x) * omega",
        "a(y) * omega + a(x) * (1 - omega)",
    ),
    Mutation(
        "the known part not given back",
        f"{SOURCE}/editing.py",
        "edited = task.imposed(y, space.decoded(estimate(x_t, t, label)))",
        "edited = space.decoded(estimate(x_t, t, label))",
    ),
    Mutation(
        "strokes forgotten where all is free",
        f"{SOURCE}/editing.py",
        "return y if self.guided else",
        "return",
    ),
    Mutation(
        "patches without an orthonormal basis",
        f"{SOURCE}/editing.py",
        "return q * r[0, 0].sign()",
        "return columns",
    ),
    Mutation(
        "noises mixed along a line",
        f"{SOURCE}/editing.py",
        "((1 - share) * psi).sin() / safe",
        "1 - share + 0 * psi",
    ),
    Mutation(
        "one cosine too few in the tangent of TrigFlow",
        f"{SOURCE}/trigflow.py",
        "-(cos**2) * (u - v)",
        "-cos * (u - v)",
    ),
    Mutation(
        "a warm-up of the whole tangent",
        f"{SOURCE}/trigflow.py",
        "-(cos**2) * (u - v) - warm_up",
        "warm_up * -(cos**2) * (u - v) - warm_up",
    ),
    Mutation(
        "sigma_data counted twice in the tangent",
        f"{SOURCE}/trigflow.py",
        "(cos * sin * x_t + du)",
        "(cos * sin * x_t + 0.5 * du)",
    ),
    Mutation(
        "a learned weighting that is not trained",
        f"{SOURCE}/weightings.py",
        "        log_variance = self.log_variance(t)\n",
        "        log_variance = self.log_variance(t).detach()\n",
    ),
    Mutation(
        "a gradient through the target of an average velocity",
        f"{SOURCE}/average_velocity.py",
        "reference = (v - broadcast_time(t - r, v) * du).detach()",
        "reference = v - broadcast_time(t - r, v) * du",
    ),
    Mutation(
        "guidance where the class is dropped",
        f"{SOURCE}/average_velocity.py",
        "v = torch.where(broadcast_time(dropped, v), v, guided)",
        "v = guided",
    ),
    Mutation(
        "a mean over pixels in the adaptive weight",
        f"{SOURCE}/distances.py",
        "else squares.sum(dim=(1, 2, 3))",
        "else squares.mean(dim=(1, 2, 3))",
    ),
    Mutation(
        "the end of a jump for its length",
        f"{SOURCE}/networks/layers.py",
        "gap = c_noise - r",
        "gap = r",
    ),
    Mutation(
        "alpha-Flow's discrete samples at weight 1",
        f"{SOURCE}/shortcuts.py",
        "alpha if alpha > 0 else 1.0)",
        "1.0)",
    ),
    Mutation(
        "alpha-Flow's target network at t",
        f"{SOURCE}/shortcuts.py",
        "t - alpha * (t - r), label, r=r)",
        "t, label, r=r)",
    ),
    Mutation(
        "both jumps of a shortcut's target from its beginning",
        f"{SOURCE}/shortcuts.py",
        "self.guided(average, x_s, s, r, label)",
        "self.guided(average, x_t, s, r, label)",
    ),
    Mutation(
        "the student as its own target below t'",
        f"{SOURCE}/objectives.py",
        "torch.where(broadcast_time(r < self.t_split, x_r), below, above)",
        "above",
    ),
    Mutation(
        "samples at t' in the plain mean",
        f"{SOURCE}/objectives.py",
        "self.boundary_weight / share, 1 / (1 - share))",
        "self.boundary_weight, 1 + 0 * t)",
    ),
    Mutation(
        "the limit on r / t",
        f"{SOURCE}/pairs.py",
        "(t * (1 - adjustment / n)).clamp_min",
        "(t * (1 - adjustment / num_scales).clamp_max(self.ratio_limit)).clamp_min",
    ),
    Mutation(
        "RAdam without its rectification",
        f"{SOURCE}/training/optimizers.py",
        "return r * math.sqrt(1 - beta_2**t)",
        "return math.sqrt(1 - beta_2**t)",
    ),
    Mutation(
        "a step taken before the look at it",
        f"{SOURCE}/training/module.py",
        "found_inf(inner, left_out if later else None)",
        "found_inf(inner, None)",
    ),
    Mutation(
        "averages updated before the look",
        f"{SOURCE}/training/module.py",
        "        if not self.guard.looking:\n            self._complete()",
        "        self._complete()",
    ),
    Mutation(
        "N(k) of a step that is left out",
        f"{SOURCE}/training/module.py",
        "losses is None or self._taken_back",
        "losses is None",
    ),
]

TESTS = [
    "averaging",
    "preconditioning",
    "schedules",
    "grids",
    "pairs",
    "distances",
    "weightings",
    "solvers",
    "steps",
    "samplers",
    "editing",
    "randomness",
    "tangents",
    "average_velocity",
    "shortcuts",
    "lpips",
    "objectives",
    "trigflow",
    "truncated_objective",
    "trajectory",
    "optimizers",
    "precision",
    "golden",
]


def file_of_test(name: str) -> Path:
    """Return the file of a test in its room."""
    return next((ROOT / "tests").rglob(f"test_{name}.py"))


def first_failure(mutation: Mutation | None) -> str | None:
    """Return the first test that fails in a copy with the error, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        if mutation is not None:
            file = copy / mutation.file
            file.write_text(file.read_text().replace(mutation.before, mutation.after))
        files = [str(file.relative_to(ROOT)) for file in map(file_of_test, TESTS)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *files],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        if done.returncode not in (0, 1) and not found:
            raise SystemExit(f"the tests could not run:\n{done.stdout}{done.stderr}")
        return found[1] if found else None


def main(names: list[str]) -> int:
    failed = first_failure(None)
    if failed:
        print(f"the tests fail without any error: {failed}")
        return 1
    unnoticed = 0
    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        failed = first_failure(mutation)
        unnoticed += failed is None
        print(f"{mutation.name:50s} {failed or 'NOT NOTICED'}", flush=True)
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
