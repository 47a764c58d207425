#!/usr/bin/env bash
# Programs that some tests run and pip cannot bring: a headless Chromium (the server's page) and opus-tools
# (the demo corpus's codec). Installed where that is possible without asking; elsewhere those tests are skipped.
set -u
MISSING=()
command -v opusenc > /dev/null || MISSING+=(opus-tools)
command -v chromium-headless-shell > /dev/null || command -v chromium > /dev/null ||
    command -v google-chrome > /dev/null || MISSING+=(chromium-headless-shell)
[ ${#MISSING[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update > /dev/null && apt-get -qq install -y --no-install-recommends "${MISSING[@]}" > /dev/null && exit 0
fi
echo "Not installed: ${MISSING[*]}. The tests that need them will be skipped; apt-get install them to run those too."
