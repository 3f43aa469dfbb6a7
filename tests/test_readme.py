"""README says what is there."""
import re

from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()


def test_the_file_table_names_every_file_with_its_length():
    table = {name: int(lines)
             for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)}
    files = {path.name: path.read_text().count("\n") for path in ROOT.glob("*.py")}
    assert table.keys() == files.keys()
    assert all(abs(table[name] / files[name] - 1) < 0.02 for name in files), files


def test_every_flag_that_readme_names_exists():
    scripts = ("data.py", "train.py", "sample.py", "verify.py")
    known = "".join(run_script(ROOT / name, "-h").stdout for name in scripts)
    torchrun = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    named = set(re.findall(r"--[a-z_]+", README)) - torchrun
    assert named and {flag for flag in named if not re.search(rf"{flag}\b", known)} == set()


def test_readme_is_short_and_filled_in():
    assert README.count("\n") < 200 and not re.search(r"@\w+@", README)
