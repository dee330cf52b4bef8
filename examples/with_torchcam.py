"""torchcam: its extractors as the budget's method, and our maps in its `overlay_mask`.

An object of torchcam, or any function (model, x, target) -> maps (N,h,w), is a method. The object must have been made
for the budget's model; its hooks stay on the model until it is closed.
"""

import torch
from torchcam.methods import LayerCAM, SmoothGradCAMpp
from torchcam.utils import overlay_mask
from torchvision.transforms.functional import to_pil_image

import part_fast
from part_fast.models import resnet_small


def main() -> None:
    torch.manual_seed(0)
    model = resnet_small().eval()
    x = torch.rand(4, 3, 32, 32)

    with SmoothGradCAMpp(model, "layer4", num_samples=2) as extractor:
        budget = part_fast.CamBudget(model, 8 / 255, 7 / 255, method=extractor)
        print(f"SmoothGradCAM++: {(budget(x) > 7.5 / 255).float().mean():.0%} of the pixels get the larger eps")

    with LayerCAM(model, "layer4") as extractor:
        theirs = part_fast.CamBudget(model, 1.0, 0.0, rule="soft", method=extractor)(x)
    ours = part_fast.CamBudget(model, 1.0, 0.0, rule="soft", method="layercam")(x)
    print(f"LayerCAM, theirs and ours: largest difference {(theirs - ours).abs().max():.0e}")

    evidence, _ = part_fast.CamBudget(model).evidence(x)
    cams = part_fast.upsample_cam(evidence, (32, 32))  # (N,H,W) in [0,1]
    picture = overlay_mask(to_pil_image(x[0]), to_pil_image(cams[0], mode="F"), alpha=0.5)
    print(f"overlay: {picture.size} {picture.mode}")


if __name__ == "__main__":
    main()
