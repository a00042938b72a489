#!/usr/bin/env bash
# Upload one image through Flower's REST API: upload_with_flower.sh IMAGE_URL
#
# FLOWER_URL is Flower's address, FLOWER_LOGIN its "user:password". Flower answers its API only with a login
# (FLOWER_BASIC_AUTH where Flower runs) or where FLOWER_UNAUTHENTICATED_API=true allows it without one; then leave
# FLOWER_LOGIN out.
set -euo pipefail

login() { test -z "${FLOWER_LOGIN:-}" || printf 'user = "%s"\n' "$FLOWER_LOGIN"; }

ask() { # ask PATH [CURL OPTIONS…]; the login goes through a pipe, so that it is not in the list of processes
  local path=$1
  shift
  curl --silent --show-error --fail-with-body --config <(login) "$@" "$FLOWER_URL$path"
}

field() { sed -nE "s/.*\"$1\": ?\"([^\"]*)\".*/\1/p"; }

refused() { # Flower writes the error object as Python does, inside one JSON string; its sentence ends the traceback
  local server sentence
  server=$(grep -oE "'server_name': ('[^']*'|None)" <<<"$1" | head -n 1 | cut -d "'" -f 4) || true
  sentence=$(sed -nE 's/.*\\n[A-Za-z_.]+: ([a-z_]+: .*)\\n"\}$/\1/p' <<<"$1")
  echo "${sentence:-$1} [${server:-no server}]"
}

sent=$(ask /api/task/send-task/pacs.upload --data "{\"kwargs\": {\"job\": {\"image_url\": \"$1\"}}}")
id=$(field task-id <<<"$sent")

for _ in $(seq 120); do
  answer=$(ask "/api/task/result/$id")
  case $(field state <<<"$answer") in
    SUCCESS)
      echo "stored on $(field server_name <<<"$answer"): $(field viewer_url <<<"$answer")"
      exit 0
      ;;
    FAILURE)
      refused "$answer" >&2
      exit 1
      ;;
  esac
  sleep 0.5
done
echo "$id is not over yet; ask again: $FLOWER_URL/api/task/result/$id" >&2
exit 3
