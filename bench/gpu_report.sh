#!/usr/bin/env bash
# On a GPU machine, from a fresh clone: build, check, sanitize and time everything; leaves one JSON and one Markdown file to commit.
#   bash bench/gpu_report.sh [folder for the report, default bench/results]
# Needs nvcc, Python 3.10 or later with torch (a CUDA build) and transformers; compute-sanitizer where there is one. Under 8 minutes on an H200's machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:-bench/results}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail=0
note() { printf '\n== %s (%d s so far)\n' "$*" "$SECONDS"; }

note "environment"
# The environment's own torch: another one would be gigabytes, and might not match the driver.
python3 -m venv --system-site-packages "$work/venv" && . "$work/venv/bin/activate" || exit 1
python - <<'CHECK' || exit 1
import sys
try:
    import torch, transformers
except ImportError as error:
    sys.exit(f"gpu_report: expected this Python to have torch and transformers, got: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu_report: expected a CUDA device, torch sees none")
print(torch.__version__, torch.cuda.get_device_name(0))
CHECK

note "build"
arch=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))')
[ "$arch" = 90 ] && arch=90a
EFFVLM_CUDA=ON EFFVLM_CUDA_ARCHS="$arch-real" EFFVLM_WERROR=ON pip install -q ".[test]" || exit 1
effvlm info

note "tests on the device"
pytest -m cuda -p no:cacheprovider | tee "$work/tests.txt"
[ "${PIPESTATUS[0]}" = 0 ] || fail=1

note "compute-sanitizer"
: > "$work/sanitizer.txt"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    echo "-- $tool" | tee -a "$work/sanitizer.txt"
    # One small case per op and behaviour: the tool costs a factor of 10 to 100. No caching allocator, so that every tensor has edges of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
      python -m pytest -m cuda -p no:cacheprovider -x tests/test_conformance.py -k "strides or writes" 2>&1 | tail -3 | tee -a "$work/sanitizer.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || fail=1
  done
else
  echo "compute-sanitizer was not found" | tee "$work/sanitizer.txt"
fi

note "bench"
python bench/run.py --device cuda --json > "$work/bench.json" || fail=1

note "report"
python bench/gpu_report.py "$work" "$out" || fail=1
note "done, $([ $fail = 0 ] && echo all well || echo WITH FAILURES)"
exit $fail
