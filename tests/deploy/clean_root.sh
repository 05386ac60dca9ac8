#!/usr/bin/env bash
# A clean Debian 12, to see that `make run` needs no more than README.md says.
#
#   clean_root.sh make ROOT TREE   debootstrap into ROOT; TREE's files become the repository /src.git in it
#   clean_root.sh run ROOT         clone /src.git once, then `make run` with an empty HOME, until a signal comes
#
# Needs root, debootstrap, git and a Debian mirror: the one that apt uses on this machine. How the network is reached
# (proxies, certificates, pip's settings) is taken from this machine as well. Mounts live in a namespace of their own
# and end with it, so ROOT can simply be removed.
set -eu

packages=git,make,python3,python3-venv,ca-certificates
suite=bookworm

# The mirror that apt's lists name for the suite, in whichever of their two formats.
mirror() {
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    awk -v suite="$suite" '
      function found(uri) { if (!done++) print uri }
      /^deb /    { sub(/\[[^]]*\] */, ""); if ($3 == suite) found($2) }
      /^Types:/  { uri = named = "" }
      /^URIs:/   { uri = $2 }
      /^Suites:/ { named = ($2 == suite) }
      uri != "" && named { found(uri) }'
}

# Names and values of what says how the network is reached; paths that only exist outside stay outside.
network() {
  env -0 | while IFS= read -r -d '' pair; do
    case "${pair%%=*}" in
      http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY) printf '%s\0' "$pair" ;;
      PIP_FIND_LINKS | PIP_CERT | PIP_CONFIG_FILE) ;;
      PIP_*) printf '%s\0' "$pair" ;;
    esac
  done
}

make_root() {
  root=$1 tree=$2
  from=$(mirror)
  [ -n "$from" ] || { echo "apt's lists name no mirror for $suite" >&2; exit 1; }
  eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
  export http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}"
  debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$from"
  cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
  [ ! -e /etc/pip.conf ] || cp -L /etc/pip.conf "$root/etc/"
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  # What is in the tree now, committed or not, but nothing that git ignores.
  mkdir "$root/src"
  git -C "$tree" ls-files -z -co --exclude-standard |
    (cd "$tree" && while IFS= read -r -d '' name; do [ ! -e "$name" ] || printf '%s\0' "$name"; done) |
    tar -C "$tree" --null -T - -c | tar -C "$root/src" --no-same-owner -x
  git -C "$root/src" init -q
  git -C "$root/src" add -A
  git -C "$root/src" -c user.name=test -c user.email=test@localhost commit -q -m tree
  git clone -q --bare "$root/src" "$root/src.git"
  rm -rf "$root/src"
  mkdir -p "$root/home/empty"
}

# Runs inside the mount namespace.
inside() {
  root=$1
  mount --rbind /proc "$root/proc"
  mount --rbind /dev "$root/dev"
  settings=()
  while IFS= read -r -d '' pair; do settings+=("$pair"); done < <(network)
  # shellcheck disable=SC2016  # the inner shell expands
  exec chroot "$root" env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/home/empty LANG=C.UTF-8 \
    "${settings[@]}" ${NBGATE_SERVER__LISTEN:+"NBGATE_SERVER__LISTEN=$NBGATE_SERVER__LISTEN"} sh -ec '
      cd /srv
      [ -d nbgate ] || git clone -q /src.git nbgate
      cd nbgate
      exec make run'
}

case "${1:-}" in
  make) make_root "$2" "$3" ;;
  run) exec unshare --mount --propagation private "$0" inside "$2" ;;
  inside) inside "$2" ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 64 ;;
esac
