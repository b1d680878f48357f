#!/usr/bin/env bash
# Everything that is to be run on a GPU, in under 8 minutes: build, store tests, compute-sanitizer, benchmarks, and a short table.
#
#     benchmarks/gpu_check.sh [FOLDER]       # results into FOLDER, build/gpu_check if left out
#
# Needs nvcc, a torch for CUDA (2.11 or newer), pytest, hypothesis and numpy; Ray is not needed. Each part goes on when another has failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD FIITED_CUDA_ARCHITECTURES=${FIITED_CUDA_ARCHITECTURES:-90}

part() {  # part NAME SECONDS COMMAND...
  local name=$1 most=$2 start=$SECONDS
  shift 2
  local outcome="ok"
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || outcome="FAILED ($?)"
  echo "$outcome, $((SECONDS - start)) s" >"$out/$name.result"
  tail -n 3 "$out/$name.log"
}

# The sanitizer slows kernels down many times: a few of the tests, on the GPU only.
sanitized() {
  compute-sanitizer --tool "$1" --error-exitcode 9 "$python" -m pytest -q -x --confcutdir=tests/store tests/store/test_silent_faults.py \
    -k "cuda and (comes_back or wins or adam)"
}
without_ray=()
"$python" -c 'import ray' 2>/dev/null || without_ray=(--ignore=tests/store/test_sketch.py)
side_by_side=()
"$python" -c 'import xdist' 2>/dev/null && side_by_side=(-n 8)
export -f sanitized
export python FIITED_CHECKS=at_once

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || { echo "gpu_check: torch sees no GPU here" >&2; exit 1; }
part build 150 "$python" setup.py -q build_ext --inplace
part emulation 60 env FIITED_EMULATION=1 "$python" setup.py -q build_ext --inplace
part benchmark 60 env FIITED_CHECKS=later "$python" benchmarks/store_device.py cuda "$out/store.json"
part memcheck 150 bash -c "sanitized memcheck" &
part racecheck 150 bash -c "sanitized racecheck" &
part tests 150 "$python" -m pytest -q "${side_by_side[@]}" --confcutdir=tests/store tests/store "${without_ray[@]}" -k "cuda or test_devices"
wait

echo
cat "$out/benchmark.log"
failed=0
for name in build emulation benchmark tests memcheck racecheck; do
  printf '%-12s%s\n' "$name" "$(cat "$out/$name.result")"
  [[ $(cat "$out/$name.result") == ok* ]] || failed=1
done
exit "$failed"
