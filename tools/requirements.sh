#!/bin/sh
# Makes sure that the system tools of the groups given (default: all) are there; see the table in tools/requirements.
# As root on a Debian it installs what is missing. Otherwise it says what is missing: an error for the group
# build, a notice for the others, whose tests are then skipped.
set -eu

here=$(dirname "$(readlink -f "$0")")
PYTHON=${PYTHON:-python3}
PATH=$PATH:/usr/sbin:/sbin
[ $# -gt 0 ] || set -- build test

is_there() {
    case $1 in
    python:Python.h)
        "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null ;;
    python:*) "$PYTHON" -c "import ${1#python:}" 2>/dev/null ;;
    libfuzzer)
        echo 'int LLVMFuzzerTestOneInput(const char *at, unsigned long n) { return at == 0 && n > 0; }' |
            clang -fsanitize=fuzzer,address,undefined -x c - -o /dev/null 2>/dev/null ;;
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

# Lines "group what package purpose" of what the groups given lack.
missing() {
    while read -r group what package purpose; do
        case $group in '#'* | '') continue ;; esac
        for wanted in "$@"; do
            if [ "$group" = "$wanted" ] && ! is_there "$what"; then
                echo "$group $what $package $purpose"
            fi
        done
    done <"$here/requirements"
}

lacking=$(missing "$@")
[ -n "$lacking" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    packages=$(echo "$lacking" | cut -d ' ' -f 3 | sort -u)
    echo "installing system packages:" $packages
    export DEBIAN_FRONTEND=noninteractive
    # The package lists may be absent or older than the packages: then the second attempt has new ones.
    apt-get install -qq -y --no-install-recommends $packages >/dev/null 2>&1 || {
        apt-get update -qq && apt-get install -qq -y --no-install-recommends $packages >/dev/null
    } || echo "requirements: apt-get could not install all of them" >&2
    lacking=$(missing "$@")
fi

[ -n "$lacking" ] || exit 0
echo "$lacking" | while read -r group what package purpose; do
    echo "requirements: $what is missing (Debian package $package), needed to $group: $purpose" >&2
done
case " $(echo "$lacking" | cut -d ' ' -f 1 | tr '\n' ' ') " in
*' build '*) exit 1 ;;
esac
