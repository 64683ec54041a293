#!/usr/bin/env bash
# Compiles and links every .cu for sm_80 and sm_90a, and to PTX, without a GPU and against whatever torch there is.
# usage: tools/cuda_check.sh PYTHON
# The three symbols that only a CUDA torch has are left to a stand-in for libtorch_cuda.so, by its name.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 out=build/cuda-check
command -v nvcc >/dev/null || { echo "cuda-check: nvcc was not found on PATH" >&2; exit 1; }
mkdir -p "$out/stub"
torch=$("$python" -c "import os, torch; print(os.path.dirname(torch.__file__))")
gcc -shared -Wl,-soname,libtorch_cuda.so -o "$out/stub/libtorch_cuda.so" -x c - </dev/null

flags=(-std=c++20 -O3 -Xcompiler -fPIC -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 -Icsrc "-I$torch/include"
  "-I$torch/include/torch/csrc/api/include" -gencode arch=compute_80,code=sm_80
  -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90 -Xptxas -warn-spills)
objects=()
while IFS= read -r file; do
  object=$out/$(tr / _ <<<"${file%.cu}").o
  echo "nvcc $file"
  nvcc "${flags[@]}" -c "$file" -o "$object"
  objects+=("$object")
done < <(find csrc/cuda -name '*.cu' | sort)
nvcc -shared -cudart static -o "$out/cuda.so" "${objects[@]}" "-L$torch/lib" "-L$out/stub" -ltorch_cpu \
  -Xlinker --no-as-needed -ltorch_cuda
echo "cuda-check: ${#objects[@]} file(s) compiled for sm_80, sm_90a and PTX, linked as $out/cuda.so"
