#!/usr/bin/env bash
# Build the native kernels with sanitizers and run check.cpp over them: sanitize.sh [build folder] [sanitizers]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
native="$here/../../../src/fracbit/kernels/native"
build="${1:-$(mktemp -d)}"
kinds="${2:-address,undefined}"
mkdir -p "$build"

flags=(-std=c++17 -O0 -g1 -w -fsanitize="$kinds" -fno-sanitize-recover=all -fno-omit-frame-pointer -I "$native" -pthread)
compile() {
    local name="$1" source="$2"
    shift 2
    "${CXX:-g++}" "${flags[@]}" "$@" -c "$source" -o "$build/$name.o"
}
objects=(linear pool plain avx2 avx512 check)
vectors=() more=()
if [[ "$(uname -m)" == x86_64 ]]; then
    vectors=(-mavx2 -mfma -mf16c)
    more=("${vectors[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni)
fi
compile linear "$native/linear.cpp" &
compile avx512 "$native/avx512.cpp" ${more[@]+"${more[@]}"} &
compile avx2 "$native/avx2.cpp" ${vectors[@]+"${vectors[@]}"} &
wait -n; compile plain "$native/plain.cpp" &
wait -n; compile pool "$native/pool.cpp" &
wait -n; compile check "$here/check.cpp" &
wait
objects=("${objects[@]/%/.o}")
"${CXX:-g++}" "${flags[@]}" "${objects[@]/#/$build/}" -o "$build/check"
ASAN_OPTIONS=detect_leaks=1 "$build/check"
