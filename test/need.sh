#!/usr/bin/env bash
# Makes sure that the programs the tests check against are there: installs them
# as root on Debian, says what is missing otherwise.
set -euo pipefail

# program => Debian package
declare -A need=(
  [qemu-img]=qemu-utils [qemu-io]=qemu-utils [fusermount3]=fuse3 [mkfs.ext4]=e2fsprogs [e2fsck]=e2fsprogs [debugfs]=e2fsprogs [mkfs.xfs]=xfsprogs
  [xfs_db]=xfsprogs [fuser]=psmisc [sgdisk]=gdisk [sfdisk]=fdisk [losetup]=mount [lvm]=lvm2 [blkid]=util-linux [dumpe2fs]=e2fsprogs [chattr]=e2fsprogs
  [tune2fs]=e2fsprogs [qemu-system-x86_64]=qemu-system-x86 [unshare]=util-linux [gcc]=gcc [ip]=iproute2 [debootstrap]=debootstrap [grub-mkimage]=grub-common [mcopy]=mtools [mkfs.vfat]=dosfstools
  [fsck.vfat]=dosfstools [mshowfat]=mtools [mkfs.exfat]=exfatprogs [fsck.exfat]=exfatprogs
  [setpriv]=util-linux [strace]=strace [zsh]=zsh [fish]=fish [python3]=python3 [mkntfs]=ntfs-3g [ntfs-3g]=ntfs-3g [wimcapture]=wimtools [rsync]=rsync
  [bsdtar]=libarchive-tools [unzip]=unzip [tar]=tar [nbdinfo]=libnbd-bin [nbdcopy]=libnbd-bin [nbdkit]=nbdkit [qemu-nbd]=qemu-utils [fio]=fio
  [mdadm]=mdadm [cryptsetup]=cryptsetup-bin [thin_restore]=thin-provisioning-tools [busybox]=busybox-static [mkfs.btrfs]=btrfs-progs
  [btrfs]=btrfs-progs [ntfscp]=ntfs-3g [dislocker-file]=dislocker [genisoimage]=genisoimage [mkzftree]=genisoimage [xorriso]=xorriso
  [nfs-ls]=libnfs-utils [nfs-cp]=libnfs-utils [nfs-cat]=libnfs-utils
)
missing=()
for program in "${!need[@]}"; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("${need[$program]}")
done
# file => Debian package
declare -A files=(
  [/usr/lib/grub/i386-pc/boot.img]=grub-pc-bin [/usr/lib/grub/x86_64-efi/fat.mod]=grub-efi-amd64-bin
  [/usr/include/nfsc/libnfs.h]=libnfs-dev [/usr/include/fuse3/fuse.h]=libfuse3-dev [/usr/lib/x86_64-linux-gnu/qemu/block-nfs.so]=qemu-block-extra [/usr/share/OVMF/OVMF_CODE_4M.fd]=ovmf [/usr/share/unicode/UnicodeData.txt]=unicode-data
)
for file in "${!files[@]}"; do
  [ -e "$file" ] || missing+=("${files[$file]}")
done
/usr/bin/python3 -c 'import prometheus_client' 2>/dev/null || missing+=(python3-prometheus-client)
/usr/bin/python3 -c 'import pyvhdi' 2>/dev/null || missing+=(python3-libvhdi)
/usr/bin/python3 -c 'import pybde' 2>/dev/null || missing+=(python3-libbde)
/usr/bin/python3 -c 'import hivex' 2>/dev/null || missing+=(python3-hivex)
[ ${#missing[@]} -eq 0 ] && exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  exit 0
fi
echo "missing: ${missing[*]} (on Debian: apt-get install ${missing[*]})" >&2
exit 1
