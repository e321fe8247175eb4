#!/bin/bash
# A backup that can lie anywhere: a tree, through tar, encrypted as it is written; and the way back.
#
# Nothing of it is on disk in the clear. The name in --aad is needed again to restore, so that one backup cannot be put in the place of
# another. Keep the keystore and the passphrase somewhere else: without them this is noise.
#
# Prints:
#
#     the backup begins with MKE2
#     restored: they are the same
set -euo pipefail  # a tar that fails must not look like a backup

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/papers" "$work/restored"
echo "the deed to the house" > "$work/papers/deed"

tar -c -C "$work" papers | kms-client encrypt-file --in - --out "$work/papers.tar.mke" --aad papers-2026
echo "the backup begins with $(head -c 4 "$work/papers.tar.mke")"

kms-client decrypt-file --in "$work/papers.tar.mke" --out - --aad papers-2026 | tar -x -C "$work/restored"
cmp "$work/papers/deed" "$work/restored/papers/deed" && echo "restored: they are the same"
