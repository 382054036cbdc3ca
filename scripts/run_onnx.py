"""python run_onnx.py MODEL.onnx PHOTO LABELS.png: a model of segdcn-export with onnxruntime and numpy alone.

Neither segdcn nor PyTorch is needed; Pillow only opens and saves the pictures. Prints the share of each class.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, photo, output = sys.argv[1:]

session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
names, palette, mean, std = (json.loads(about[key]) for key in ("class_names", "palette", "mean", "std"))

pixels = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
normalised = (pixels / 255 - mean) / std
image = normalised.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, H, W)
(logits,) = session.run(["logits"], {"image": image})  # (1, K, H, W)
labels = logits[0].argmax(axis=0).astype(np.uint8)  # (H, W)

picture = Image.fromarray(labels)
picture.putpalette([value for colour in palette for value in colour])
picture.save(output)
for number, name in enumerate(names):
    print(f"{(labels == number).mean():7.2%}  {name}")
