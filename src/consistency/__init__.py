"""Consistency models: networks that map any noisy point of a probability-flow ODE to its data point.

Every method is one formula with its parts swapped,

    loss = lambda(t, r) d( f_theta(x_t, t), stopgrad f_theta-(x_r, r) )      r < t, x_t -> x_r along the PF-ODE,

so a mode is a YAML in conf/mode that names the parts, and no code branches on a mode's name. The map; a module
imports only from floors below it, and the core (floors 1 to 4) needs torch and jaxtyping alone:

    src/train.py sample.py compare.py       the verbs, each with conf/<verb>.yaml
    floor 1, words      errors tensors schedules grids preconditioning averaging randomness
                        networks: adm song dhariwal (with their unet and layers) mlp
    floor 2, phrases    processes solvers pairs distances weightings denoiser tangents
    floor 3, sentences  steps samplers
    floor 4, paragraph  objectives
    the shell           checkpoint (tensors and a plain card), generation (numbered samples), pictures, perceptual
                        (LPIPS with its weights), schema (the keys of a configuration), command (what all verbs share),
                        sampling and comparison (the commands)
      data              module (the LightningDataModule), batches (order by position), source; digits folder lsun
      evaluation        classifier quality
      training          run (configuration -> finished run), module (the LightningModule), launch (DDP), logging;
                        callbacks: schedules averages periodic checkpoints evaluation pictures progress
"""
