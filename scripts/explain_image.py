"""Draw docs/explain.png: the panel of one drawn bird, by a model with ULSAM and its base model, at a size for a page.

    ulsam birds birds --size 128 --train 60 --val 20 --classes broadbar-spotted-shortbill,\\
broadbar-speckled-shortbill,finebar-spotted-shortbill,finebar-speckled-shortbill
    for model in "slim --replace 14,17" base; do
        ulsam train birds --weights mobilenetv2.safetensors --size 128 --epochs 4 --batch-size 16 --lr 0.01 \\
            --smoothing 0 --crop-scale 0.8 1 --out runs/$model
    done
    python scripts/explain_image.py runs/slim/model.safetensors runs/base/model.safetensors \\
        birds/val/finebar-spotted-shortbill/0008.jpg
"""

import argparse
import io
from pathlib import Path

from PIL import Image

import ulsam
from ulsam.base.files import write_atomic
from ulsam.explanation.panel import panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model file")
    parser.add_argument("base", help="model file of the base model")
    parser.add_argument("image", type=Path, help="a drawn bird, in the folder of its class")
    parser.add_argument("--out", default="docs/explain.png")
    args = parser.parse_args()
    found, base = (ulsam.explain(model, args.image) for model in (args.model, args.base))
    truth = args.image.parent.name
    drawn = panel(found, base, title=f"{truth}/{args.image.name}", truth=truth)
    buffer = io.BytesIO()
    palette = drawn.quantize(256, Image.Quantize.MAXCOVERAGE)  # median cut would lose the ends of the color scale
    drawn.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, "png", optimize=True)
    write_atomic(args.out, buffer.getvalue())


if __name__ == "__main__":
    main()
