#!/usr/bin/env bash
# Build the native kernels with sanitizers and run check.cpp over them: sanitize.sh [build folder] [sanitizers] [every n-th weight]
# `thread` as sanitizers looks for races between those who share out tasks.
# For another processor, CXX names a cross compiler, RUN what runs its programs; `none` as sanitizers builds without:
#   CXX=aarch64-linux-gnu-g++ RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" sanitize.sh build none 13
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
native="$here/../../../src/fracbit/kernels/native"
build="${1:-$(mktemp -d)}"
kinds="${2:-address,undefined}"
every="${3:-1}"
mkdir -p "$build"

flags=(-std=c++17 -O0 -g1 -w -I "$native" -pthread)
if [[ "$kinds" != none ]]; then flags+=("-fsanitize=$kinds" -fno-sanitize-recover=all -fno-omit-frame-pointer); fi
declare -A vectors=()
case "$("${CXX:-g++}" -dumpmachine)" in
x86_64*)
    vectors[avx2]="-mavx2 -mfma -mf16c"
    vectors[avx512]="${vectors[avx2]} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni"
    vectors[attention]="-mavx512f -mfma"
    vectors[gram]="-mavx512f -mavx512bf16"
    ;;
aarch64* | arm64*) vectors[neon_dot]="-march=armv8.2-a+dotprod" ;;
esac
compile() { # one file, from the sources or from here
    # shellcheck disable=SC2086 - several flags in one word
    "${CXX:-g++}" "${flags[@]}" ${vectors[$1]-} -c "$2" -o "$build/$1.o"
}
sources=()
for source in "$native"/*.cpp "$here"/check.cpp; do # those that need no Python
    case "$(basename "$source")" in module.cpp | python_*.cpp) ;; *) sources+=("$source") ;; esac
done
objects=()
for source in "${sources[@]}"; do
    name="$(basename "$source" .cpp)"
    objects+=("$build/$name.o")
    if (($(jobs -rp | wc -l) >= 3)); then wait -n; fi
    compile "$name" "$source" &
done
for job in $(jobs -p); do wait "$job"; done
"${CXX:-g++}" "${flags[@]}" "${objects[@]}" -ldl -o "$build/check"
# shellcheck disable=SC2086 - a command and its arguments
ASAN_OPTIONS=detect_leaks=1 ${RUN-} "$build/check" "$every"
