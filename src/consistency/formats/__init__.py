"""Checkpoint formats: the files of other programs in, ours out.

| file | what it is | module |
|---|---|---|
| `.ckpt` of a run, `.safetensors` that we wrote | ours, with its card | `sealed`, `consistency.checkpoint` |
| `.pt`, `.safetensors` | flat state dict of OpenAI's `UNetModel` | `openai` |
| `.pkl`, `training-state-*.pt` | NVlabs modules (EDM, ECT) | `nvlabs` |
| no suffix | training state of the JAX code, flax MessagePack | `jcm` |
| folder | `ConsistencyModelPipeline` or `UNet2DModel` | `diffusers` |

A format is known by the content, never by the name. Nothing in a file is executed, every size in it is checked before
memory is taken, and what does not fit ends in one error. `reading` finds the format; `opened` is what every reader
returns; `pickles` and `messagepack` read containers as data; `timetable` rewrites a time embedding for diffusers;
`released` knows the published files by name.
"""
