package vspheretest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// FakeVDDK makes an nbdkit whose vddk plugin uses the flat file below the datastore's directory instead; what it was asked for is appended to notes,
// the password that it got is in notes + ".password".
func FakeVDDK(t testing.TB, datastore string) (program, notes string) {
	t.Helper()
	if _, err := exec.LookPath("nbdkit"); err != nil {
		if os.Getenv("HOLDFAST_TEST_ALL") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	program, notes = filepath.Join(dir, "nbdkit"), filepath.Join(dir, "notes")
	script := "#!/bin/bash\nprintf '%s\\n' \"$@\" >> '" + notes + "'\nwords=()\nfor a in \"$@\"; do [ \"$a\" = vddk ] && break; words+=(\"$a\"); done\n" +
		"for a in \"$@\"; do case \"$a\" in file=*) file=${a#*] };; esac; done\n" +
		"cat <&3 > '" + notes + ".password'\nexec nbdkit \"${words[@]}\" file '" + datastore + "'/\"${file%.vmdk}-flat.vmdk\"\n"
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return program, notes
}
