"""Checkpoint formats: the files of other programs in, ours in and out.

| file | content | module |
|---|---|---|
| `.ckpt` of a run, converted model | ours, with its card | `ours`, `sealed` (safetensors) |
| `.pt`, `.safetensors` | flat state dict of OpenAI's `UNetModel` | `openai` |
| `.pkl`, `training-state-*.pt` | NVlabs modules (EDM, ECT) | `nvlabs` |
| no suffix | training state of the JAX code, flax MessagePack | `jcm` |
| folder | `ConsistencyModelPipeline` or `UNet2DModel` | `diffusers` and its `_names`, `_settings`, `_write` |

Nothing in a file is executed, every size in it is checked before memory is taken, and a file that does not fit ends in one
error. `reading` detects the format; every reader returns the `Checkpoint` of `opened`; `pickles`, with `pickle_calls`, and
`messagepack` read containers as data; `wrapped` finds state dicts below any keys; `timetable` rewrites a time embedding
for diffusers; `released` knows the published files by name.
"""
