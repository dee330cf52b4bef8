"""grad-cam: its classes and objects as the budget's method, and our maps in its `show_cam_on_image`.

A class is called with each batch, on the budget's own target layer, and hangs no hooks on your model in between. An
object explains the layers that it was made for; it must have been made for the budget's model.
"""

import torch
from pytorch_grad_cam import EigenCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.image import show_cam_on_image

import part_fast
from part_fast.models import resnet_small


def main() -> None:
    torch.manual_seed(0)
    model = resnet_small()
    x = torch.rand(4, 3, 32, 32)

    by_class = part_fast.CamBudget(model, 8 / 255, 7 / 255, method=GradCAMPlusPlus, target_layer="layer4")
    with GradCAMPlusPlus(model=model, target_layers=[model.layer4]) as explain:
        by_object = part_fast.CamBudget(model, 8 / 255, 7 / 255, method=explain)
        print(f"a class and an object agree: {torch.equal(by_class(x), by_object(x))}")
    eigen = part_fast.CamBudget(part_fast.AttackModel(model), 8 / 255, 7 / 255, method=EigenCAM)
    print(f"EigenCAM of an AttackModel: {(eigen(x) > 7.5 / 255).float().mean():.0%} of the pixels get the larger eps")

    evidence, _ = part_fast.CamBudget(model).evidence(x)
    cams = part_fast.upsample_cam(evidence, (32, 32))  # (N,H,W) in [0,1], as show_cam_on_image takes them
    picture = show_cam_on_image(x[0].permute(1, 2, 0).numpy(), cams[0].numpy(), use_rgb=True)
    print(f"overlay: {picture.shape} {picture.dtype}")


if __name__ == "__main__":
    main()
