# Builds what a cluster is made of into $cache/bin and $cache/images. Sourced by scripts/cluster.
#
# Each piece has a stamp named after what it was built from: what did not change is not built again.
# shellcheck shell=bash disable=SC2154

kubernetes_version=1.36.3

# Runs a command unless its stamp says that it ran for the same KEY before.
unless_built() { # unless_built NAME KEY COMMAND...
    local name=$1 key
    key=$(printf '%s' "$2" | sha256sum | cut -c1-16)
    shift 2
    [ -e "$cache/stamps/$name-$key" ] && return
    say "building $name"
    rm -f "$cache/stamps/$name"-????????????????
    "$@" || fail "$name does not build"
    touch "$cache/stamps/$name-$key"
}

# What a folder's files hold, as a key.
contents_of() { # contents_of FOLDER
    (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum)
}

build() {
    mkdir -p "$cache"/{bin,images,stamps}
    # Two builds at once, of a person and of the tests, would do the same work twice.
    exec 9>"$cache/lock"
    flock 9
    need go "Go $(sed -n 's/^go //p' "$parts/kubernetes/go.mod") or later from https://go.dev/dl"
    local go_version line
    go_version=$(go env GOVERSION)
    unless_built kubernetes "$go_version$kubernetes_version$(contents_of "$parts/kubernetes")" build_kubernetes
    while read -r line; do
        build_tool "$go_version" "$line"
    done < <(grep -v -e '^#' -e '^$' "$parts/tools.txt")
    unless_built programs "$go_version$(contents_of "$parts/programs")" build_programs
    build_own_images
    exec 9>&-
}

build_kubernetes() {
    local version=k8s.io/component-base/version
    local minor=${kubernetes_version#*.}
    local flags="-s -w -X $version.gitVersion=v$kubernetes_version"
    flags+=" -X $version.gitMajor=${kubernetes_version%%.*} -X $version.gitMinor=${minor%.*}"
    (cd "$parts/kubernetes" &&
        CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags "$flags" -o "$cache/bin/kubernetes") || return
    local part
    for part in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do
        ln -sf kubernetes "$cache/bin/$part"
    done
}

build_tool() { # build_tool GO-VERSION "PACKAGE@VERSION OPTIONS"
    local package=${2%%@*}
    # A last element such as v2 is the module's major version, not the program's name.
    # shellcheck disable=SC2086 # The options are words.
    unless_built "${package##*/}" "$1$2" \
        env GOBIN="$cache/bin" CGO_ENABLED=0 go install -trimpath -ldflags "-s -w" ${2#"${2%% *}"} "${2%% *}"
}

build_programs() {
    (cd "$parts/programs" && CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags "-s -w" -o "$cache/bin/" ./...)
}

# The images of the cluster's own pods.
build_own_images() {
    local image program
    for image in pause probe coredns; do
        program=$(sha256sum <"$cache/bin/$image")
        unless_built "image-$image" "$program$(contents_of "$parts/images")" \
            build_image "localhost/$image:test" "$cache/bin" --file "$parts/images/Dockerfile" --target "$image"
    done
}

buildah_here() {
    BUILDAH_ISOLATION=chroot buildah --root "$cache/storage" --runroot "$cache/storage-run" --storage-driver vfs "$@"
}

# Where the archive of an image is.
archive_of() { # archive_of TAG
    local name=${1#localhost/}
    echo "$cache/images/${name//[\/:]/_}.tar"
}

# Builds an image from a Dockerfile and writes it as an archive that a cluster loads. No base is fetched: it is one that
# was built here.
build_image() { # build_image TAG CONTEXT [OPTION OF buildah build]...
    local tag=$1 context=$2 archive
    archive=$(archive_of "$tag")
    shift 2
    need buildah "the package buildah"
    buildah_here build --pull=never --layers=false --quiet --tag "$tag" "$@" "$context" >/dev/null || return
    rm -f "$archive"
    buildah_here push --quiet "$tag" "docker-archive:$archive:$tag" || return
    # The image that had the tag before would stay, a whole file system each time.
    buildah_here rmi --prune >/dev/null
}

forget_images() { # forget_images TAG...
    local tag
    for tag in "$@"; do
        rm -f "$(archive_of "$tag")"
        buildah_here rmi "$tag" >/dev/null 2>&1 || true
    done
}

# Makes a Debian with the packages and commits it under TAG, for Dockerfiles that begin `FROM TAG`.
build_base() { # build_base TAG SUITE [PACKAGE]...
    local tag=$1 suite=$2 tree="$cache/base.tar" container packages
    local path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    shift 2
    need mmdebstrap "the package mmdebstrap"
    need buildah "the package buildah"
    packages=$(IFS=,; echo "$*")
    mmdebstrap --quiet --variant=minbase ${packages:+--include="$packages"} "$suite" "$tree" || return
    container=$(buildah_here from scratch) || return
    buildah_here add --quiet "$container" "$tree" / >/dev/null &&
        buildah_here config --cmd bash --env PATH="$path" "$container" &&
        buildah_here commit --quiet --rm "$container" "$tag" >/dev/null && rm -f "$tree"
}
