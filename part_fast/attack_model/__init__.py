"""AttackModel: a frozen eval-mode copy of a model, made to be attacked: the same logits, faster input gradients."""

from part_fast.attack_model.model import FP16_SCALE, PRECISIONS, AttackModel

__all__ = ["FP16_SCALE", "PRECISIONS", "AttackModel"]
