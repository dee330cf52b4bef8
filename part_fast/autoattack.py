"""AutoAttack, standard version, by its authors' code in the package `pyautoattack`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.attacks import check_images
from part_fast.eval_mode import eval_mode, grads_kept, input_gradient


def autoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float = 8 / 255, seed: int = 0) -> Tensor:
    """Adversarial images like x: APGD-CE, targeted APGD, targeted FAB, Square, each on what the last ones left right.

    x: images (N,C,H,W) in [0,1]. y: class indices (N,). eps: image units, one for all pixels. seed: of every attack;
    the random generators are as before. The model runs in eval mode and gets its mode back; no .grad is touched.
    With fewer than ten classes the targeted attacks take every wrong one.

    Source: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks", ICML 2020.
    Errors: ImportError without pyautoattack, saying how to get it; TypeError or ValueError that names the argument.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError("AutoAttack needs the package pyautoattack: pip install part_fast[aa]") from error
    check_images(x, checks.number("eps", eps, 0), (0.0, 1.0))
    checks.labels("y", y, x)
    if x.shape[0] == 0:
        return x.clone()
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), eval_mode(model), grads_kept(model), torch.inference_mode(False):
        with torch.enable_grad():
            leaf = x.clone().detach().requires_grad_()
            logits = checks.logits(model(leaf), x)
            if input_gradient(logits.sum(), leaf) is None:
                raise ValueError("model must lead from its input to the logits, got logits that do not depend on x")
        classes = logits.shape[1]
        checks.labels("y", y, x, classes)
        attack = AutoAttack(model, eps=eps, seed=seed, device=x.device)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        return attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=x.shape[0])[0]
