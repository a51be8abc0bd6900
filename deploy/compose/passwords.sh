#!/usr/bin/env bash
# Sets the passwords of hallpass's roles, once they are made.
set -euo pipefail

psql --no-psqlrc --set ON_ERROR_STOP=1 --username postgres --dbname hallpass \
    --set migrator="$HALLPASS_MIGRATOR_PASSWORD" --set service="$HALLPASS_SERVICE_PASSWORD" <<'SQL'
ALTER ROLE hallpass_migrator PASSWORD :'migrator';
ALTER ROLE hallpass_service PASSWORD :'service';
SQL
