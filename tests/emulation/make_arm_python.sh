#!/bin/sh
# Make a 64-bit ARM Python with TVM, for qemu-aarch64-static: tests/tune/test_rpc.py runs TVM's RPC
# servers on it. Needs Debian, root, debootstrap and about 900 MB.
#
#     tests/emulation/make_arm_python.sh DIR
#     FAIRY_COMPILE_ARM_PYTHON=DIR python -m pytest -m slow tests/tune/test_rpc.py
set -eu
place=$1
mkdir -p "$place/site" "$place/wheels"
debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 bookworm "$place/root"
for package in "$place"/root/var/cache/apt/archives/*.deb; do
  dpkg-deb -x "$package" "$place/root"
done
python3 -m pip download --dest "$place/wheels" --only-binary=:all: --no-deps --python-version 3.11 \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
  apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 \
  numpy ml_dtypes psutil tornado cloudpickle typing_extensions
for wheel in "$place"/wheels/*.whl; do
  python3 -m zipfile -e "$wheel" "$place/site"
done
rm -r "$place/wheels"
