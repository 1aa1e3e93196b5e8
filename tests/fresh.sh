#!/bin/sh
# `make train` and `make test` in a minimal Debian with the packages that README.md names, by a
# user without root, in a folder with a space and Chinese characters. As root:
#     sh tests/fresh.sh FOLDER [SUITE]
# FOLDER (new; 10 GB) becomes that Debian, and stays for a look at it. Needs debootstrap and an
# hour. pip's options are taken from the environment; BIND names folders to show inside, read-only,
# such as those of a local package index and of pip.conf: BIND='/opt/wheels /etc/xdg/pip'.
set -eu
debian=$1
here=$(cd "$(dirname "$0")/.." && pwd)
debootstrap --variant=minbase --include=git,make,python3,python3-venv \
    "${2:-bookworm}" "$debian"
cp /etc/resolv.conf /etc/hosts "$debian/etc/"
useradd --root "$(cd "$debian" && pwd)" --create-home student
git clone -q "$here" "$debian/home/student/李 雷/nanoGPT"
chown -R 1000:1000 "$debian/home/student"

# Mounts and processes that end with this script.
export debian
exec unshare --mount --pid --fork --kill-child sh -eu -c '
    mount -t proc proc "$debian/proc"
    mount --rbind /sys "$debian/sys"
    mount --rbind /dev "$debian/dev"
    for folder in ${BIND:-}; do
        mkdir -p "$debian$folder"
        mount --bind "$folder" "$debian$folder"
        mount -o remount,ro,bind "$debian$folder"
    done
    exec chroot --userspec=1000:1000 "$debian" env HOME=/home/student PATH=/usr/bin:/bin \
        sh -c "cd ~/*/nanoGPT && make train && make test"'
