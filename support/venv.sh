#!/bin/sh
# Install packages into an environment (Makefile): sh support/venv.sh FOLDER PYTHON PIP_ARGUMENT...
# PYTHON is a command; '' means python3 for a new environment, any supported one for an existing one.
# A working environment is kept, with its packages; a broken one is created again. Without arguments
# for pip, the exit status shows whether it works: complete, not moved, of this Python.
folder=$1 python=$2
shift 2

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null
}

supported() {
    case $1 in 3.10 | 3.11 | 3.12 | 3.13) ;; *) false ;; esac
}

# With pyenv, python3.12 may be a shim that only reports where that version is installed.
path_of() {
    installed=$(pyenv prefix "${1#python}" 2> /dev/null)
    if ! version_of "$1" > /dev/null && [ -n "$installed" ] && [ -x "$installed/bin/python" ]; then
        echo "$installed/bin/python"
    else
        echo "$1"
    fi
}

# Its scripts name the folder where it was created.
in_place() {
    here=$(cd "$folder" && pwd -P)
    created=$(. "$folder/bin/activate" > /dev/null 2>&1 && printf '%s' "$VIRTUAL_ENV")
    grep -qsF "$here/bin/" "$folder/bin/pip" || [ "$created" -ef "$folder" ]
}

works() {
    version=$(version_of "$folder/bin/python")
    supported "$version" || return 1
    [ -e "$folder/bin/pip" ] && in_place || return 1
    [ -z "$python" ] || [ "$version" = "$(version_of "$(path_of "$python")")" ]
}

if [ $# = 0 ]; then
    works
    exit
fi

if ! works; then
    command=$(path_of "${python:-python3}")
    version=$(version_of "$command")
    if ! supported "$version"; then
        for other in python3.13 python3.12 python3.11 python3.10; do
            version_of "$(path_of $other)" > /dev/null && break  # the last one, if there is none
        done
        echo "make: $command is ${version:+Python }${version:-not a working Python}: expected 3.10" \
            "to 3.13: type PYTHON=$other make train (install it first if it is missing)" >&2
        exit 1
    fi
    if [ -n "$(ls -A "$folder" 2> /dev/null)" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
        echo "make: $folder was not made by venv: remove it, or type VENV=another-folder make train" >&2
        exit 1
    fi
    "$command" -m venv --clear "$folder" || exit
fi

if ! ls -d "$folder"/lib/python*/site-packages/torch > /dev/null 2>&1; then
    echo "installing into $folder: a download of up to 4 GB (Linux: PyTorch with CUDA)"
fi
quiet=-q
[ -t 1 ] && quiet=
exec 3>&1  # not a file: the disk may be full
errors=$("$folder/bin/python" -m pip install $quiet --disable-pip-version-check "$@" 2>&1 >&3)
status=$?
[ -z "$errors" ] || printf '%s\n' "$errors" >&2
case $errors in *'[Errno 28]'* | *'No usable temporary'*)  # the words after it: any language
    echo "make: a disk is full: 6 GB are needed in $folder, and 4 GB temporarily in ${TMPDIR:-/tmp}:" \
        "free some space, or type TMPDIR=/a/larger/disk make train" >&2
    df -h "$folder" "${TMPDIR:-/tmp}" >&2
esac
exit $status
