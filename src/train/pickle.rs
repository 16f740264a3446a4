//! Tensors out of files of `torch.save`, without running what is in them.
//!
//! Input: a `.pth` file, in the zip format (PyTorch 1.6 and later) or the one before. Output: the objects of its pickle
//! as `Value`s in an arena, tensors among them, and their numbers.
//!
//! A pickle is a program for a stack machine that may call anything. Here only the calls that make tensors and ordered
//! dictionaries are known; any other makes `Value::Other`. Values refer to each other by index, so that no file,
//! however nested, makes this program recurse. Sizes are bounded by the file's.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use super::TrainError;

/// Largest accepted pickle: a state dict of a thousand tensors takes 200 KB.
pub const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Largest accepted file: twice the largest accepted weights, for an optimiser's state beside them.
pub const MAX_FILE_BYTES: u64 = 4 << 30;
/// Most axes of a tensor.
pub const MAX_AXES: usize = 8;

const LEGACY_MAGIC: [u8; 10] = [0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19];

/// Index into the arena.
type Id = usize;

/// An object of the pickle.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Int(i64),
    Text(String),
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function, `module name`.
    Global(String),
    Storage {
        kind: Kind,
        key: String,
    },
    Tensor(View),
    /// Anything that tensors are not made of.
    Other,
}

/// A tensor as a view of a storage.
#[derive(Clone, Debug, PartialEq)]
struct View {
    kind: Kind,
    key: String,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Number format of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IEEE 754, 64 bits.
    F64,
    /// IEEE 754, 32 bits.
    F32,
    /// IEEE 754, 16 bits.
    F16,
    /// bfloat16.
    Bf16,
    /// Two's complement, 64 bits.
    I64,
    /// Any other, of so many bytes.
    Unknown(usize),
}

impl Kind {
    fn of_storage(name: &str) -> Self {
        match name {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "LongStorage" => Self::I64,
            "ShortStorage" => Self::Unknown(2),
            "IntStorage" | "QInt32Storage" => Self::Unknown(4),
            "ComplexFloatStorage" => Self::Unknown(8),
            "ComplexDoubleStorage" => Self::Unknown(16),
            _ => Self::Unknown(1),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Unknown(n) => n,
        }
    }
}

/// A tensor of the file, row-major, little-endian.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Its number format.
    pub kind: Kind,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub bytes: Vec<u8>,
}

/// A dictionary of the file: the tensors in it by name. Other entries are left out.
pub type Named = BTreeMap<String, Stored>;

/// The dictionary at the top of `path`, or the first under one of `holders` in it, for which `wanted` holds of a name.
///
/// # Errors
/// A file that is not from `torch.save`, or has no such dictionary; a tensor beyond its storage.
pub fn read(path: &Path, holders: &[&str], wanted: impl Fn(&str) -> bool) -> Result<Named, TrainError> {
    let io = |source| TrainError::Io { action: "read", path: path.to_path_buf(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    if size > MAX_FILE_BYTES {
        return Err(bad(format!("a file of {size} bytes, expected at most {MAX_FILE_BYTES}")));
    }
    let mut start = [0u8; 2];
    let got = file.read(&mut start).map_err(io)?;
    drop(file);
    if start[..got] == *b"PK" { zipped(path, holders, wanted) } else { legacy(path, holders, wanted) }
}

fn bad(what: impl Into<String>) -> TrainError {
    TrainError::Data(format!("read the state dict: {}; expected a .pth file of torch.save", what.into()))
}

fn zipped(path: &Path, holders: &[&str], wanted: impl Fn(&str) -> bool) -> Result<Named, TrainError> {
    let io = |source| TrainError::Io { action: "read", path: path.to_path_buf(), source };
    let file = std::io::BufReader::new(std::fs::File::open(path).map_err(io)?);
    let mut archive = zip::ZipArchive::new(file).map_err(|e| bad(format!("zip archive: {e}")))?;
    let pickle = archive.file_names().find_map(|n| n.strip_suffix("data.pkl").map(str::to_owned));
    let folder = pickle.ok_or_else(|| bad("the archive has no data.pkl"))?;
    let mut entry = |name: &str, limit: u64| -> Result<Vec<u8>, TrainError> {
        let entry = archive.by_name(&format!("{folder}{name}")).map_err(|e| bad(format!("{name}: {e}")))?;
        if entry.size() > limit {
            return Err(bad(format!("{name} has {} bytes, expected at most {limit}", entry.size())));
        }
        let mut bytes = Vec::new();
        entry.take(limit).read_to_end(&mut bytes).map_err(|e| bad(format!("{name}: {e}")))?;
        Ok(bytes)
    };
    if entry("byteorder", 16).is_ok_and(|order| order != b"little") {
        return Err(bad("numbers in big-endian order"));
    }
    let bytes = entry("data.pkl", MAX_PICKLE_BYTES)?;
    let mut machine = Machine::default();
    let (top, _) = machine.run(&bytes)?;
    let mut storages: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    machine
        .select(top, holders, wanted)?
        .into_iter()
        .map(|(name, view)| {
            if !storages.contains_key(&view.key) {
                let data = entry(&format!("data/{}", view.key), MAX_FILE_BYTES)?;
                storages.insert(view.key.clone(), data);
            }
            let tensor = gather(&name, &view, &storages[&view.key])?;
            Ok((name, tensor))
        })
        .collect()
}

fn legacy(path: &Path, holders: &[&str], wanted: impl Fn(&str) -> bool) -> Result<Named, TrainError> {
    let io = |source| TrainError::Io { action: "read", path: path.to_path_buf(), source };
    let file = std::fs::read(path).map_err(io)?;
    // Four pickles and a fifth: a magic number, the protocol, the system, the object, the storages' keys in order.
    let mut at = 0usize;
    let mut next = |machine: &mut Machine| -> Result<Id, TrainError> {
        let end = file.len().min(at.saturating_add(MAX_PICKLE_BYTES as usize));
        let (top, used) = machine.run(file.get(at..end).unwrap_or_default())?;
        at += used;
        Ok(top)
    };
    let mut machine = Machine::default();
    if !file.windows(LEGACY_MAGIC.len()).take(16).any(|w| w == LEGACY_MAGIC) {
        return Err(bad("an unknown format"));
    }
    for _ in 0..3 {
        next(&mut machine)?;
    }
    let top = next(&mut machine)?;
    let keys = next(&mut machine)?;
    let Value::Sequence(keys) = machine.get(keys).clone() else {
        return Err(bad("no list of storages"));
    };
    let kinds: BTreeMap<String, Kind> = machine
        .values
        .iter()
        .filter_map(|v| if let Value::Storage { kind, key } = v { Some((key.clone(), *kind)) } else { None })
        .collect();
    let mut storages: BTreeMap<String, &[u8]> = BTreeMap::new();
    for key in keys {
        let Value::Text(key) = machine.get(key).clone() else {
            return Err(bad("a storage without a key"));
        };
        let kind = kinds.get(&key).copied().ok_or_else(|| bad("a storage that nothing refers to"))?;
        let count = file.get(at..).and_then(|rest| rest.first_chunk::<8>()).map(|b| u64::from_le_bytes(*b));
        let length = count.and_then(|n| usize::try_from(n).ok()).and_then(|n| n.checked_mul(kind.bytes()));
        let data = length.and_then(|n| file.get(at + 8..)?.get(..n)).ok_or_else(|| bad("the file is cut short"))?;
        at += 8 + data.len();
        storages.insert(key, data);
    }
    let mut tensors = Named::new();
    for (name, view) in machine.select(top, holders, wanted)? {
        let data = storages.get(&view.key).ok_or_else(|| bad(format!("{name}: its storage is missing")))?;
        tensors.insert(name.clone(), gather(&name, &view, data)?);
    }
    Ok(tensors)
}

/// The elements of `view`, row-major.
fn gather(name: &str, view: &View, storage: &[u8]) -> Result<Stored, TrainError> {
    let size = view.kind.bytes();
    let beyond = || bad(format!("tensor {name} reaches beyond its storage"));
    let count = view.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(beyond)?;
    let stored = Stored { kind: view.kind, shape: view.shape.clone(), bytes: Vec::new() };
    if count == 0 {
        return Ok(stored);
    }
    let last = view
        .shape
        .iter()
        .zip(&view.strides)
        .try_fold(view.offset, |at, (n, s)| (n - 1).checked_mul(*s).and_then(|step| at.checked_add(step)));
    let end = last.and_then(|l| l.checked_add(1)).and_then(|l| l.checked_mul(size)).ok_or_else(beyond)?;
    // No broadcast views either: a small file must not unfold into a large tensor.
    if end > storage.len() || count.checked_mul(size).is_none_or(|n| n > storage.len()) {
        return Err(beyond());
    }
    let mut bytes = Vec::with_capacity(count * size);
    let mut index = vec![0usize; view.shape.len()];
    for _ in 0..count {
        let at = index.iter().zip(&view.strides).map(|(i, s)| i * s).sum::<usize>() + view.offset;
        bytes.extend_from_slice(&storage[at * size..(at + 1) * size]);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < view.shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    Ok(Stored { bytes, ..stored })
}

/// The stack machine.
#[derive(Default)]
struct Machine {
    values: Vec<Value>,
}

/// What one pickle works on.
#[derive(Default)]
struct Frame {
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: BTreeMap<u64, Id>,
}

impl Machine {
    fn get(&self, id: Id) -> &Value {
        self.values.get(id).unwrap_or(&Value::Other)
    }

    fn make(&mut self, value: Value) -> Id {
        self.values.push(value);
        self.values.len() - 1
    }

    fn numbers(&self, id: Id) -> Option<Vec<usize>> {
        let Value::Sequence(ids) = self.get(id) else { return None };
        if ids.len() > MAX_AXES {
            return None;
        }
        ids.iter().map(|i| if let Value::Int(n) = self.get(*i) { usize::try_from(*n).ok() } else { None }).collect()
    }

    fn text(&self, id: Id) -> Option<&str> {
        if let Value::Text(t) = self.get(id) { Some(t) } else { None }
    }

    /// What calling `function` with `arguments` makes.
    fn call(&mut self, function: Id, arguments: Id) -> Id {
        let (Value::Global(name), Value::Sequence(arguments)) = (self.get(function), self.get(arguments)) else {
            return self.make(Value::Other);
        };
        match (name.as_str(), arguments.as_slice()) {
            ("collections OrderedDict", []) => self.make(Value::Dict(Vec::new())),
            ("torch._utils _rebuild_parameter", [data, ..]) => *data,
            ("torch._utils _rebuild_tensor_v2", [storage, offset, shape, strides, ..]) => {
                let made = match (self.get(*storage), self.get(*offset)) {
                    (Value::Storage { kind, key }, Value::Int(offset)) => usize::try_from(*offset)
                        .ok()
                        .zip(self.numbers(*shape))
                        .zip(self.numbers(*strides))
                        .filter(|((_, shape), strides)| shape.len() == strides.len())
                        .map(|((offset, shape), strides)| {
                            Value::Tensor(View { kind: *kind, key: key.clone(), offset, shape, strides })
                        }),
                    _ => None,
                };
                self.make(made.unwrap_or(Value::Other))
            }
            _ => self.make(Value::Other),
        }
    }

    /// The storage that a persistent id, `("storage", class, key, …)`, names.
    fn storage(&mut self, id: Id) -> Id {
        let made = match self.get(id) {
            Value::Sequence(parts) => match parts.as_slice() {
                [tag, class, key, ..] if self.text(*tag) == Some("storage") => {
                    match (self.get(*class), self.text(*key)) {
                        (Value::Global(class), Some(key)) => {
                            let name = class.rsplit([' ', '.']).next().unwrap_or_default();
                            Some(Value::Storage { kind: Kind::of_storage(name), key: key.to_owned() })
                        }
                        _ => None,
                    }
                }
                _ => None,
            },
            _ => None,
        };
        self.make(made.unwrap_or(Value::Other))
    }

    fn append(&mut self, list: Id, items: Vec<Id>) {
        if let Some(Value::Sequence(list)) = self.values.get_mut(list) {
            list.extend(items);
        }
    }

    fn set(&mut self, dict: Id, items: &[Id]) {
        if let Some(Value::Dict(entries)) = self.values.get_mut(dict) {
            entries.extend(items.as_chunks::<2>().0.iter().map(|[k, v]| (*k, *v)));
        }
    }

    /// Runs the pickle at the start of `code`; the object and the bytes used.
    fn run(&mut self, code: &[u8]) -> Result<(Id, usize), TrainError> {
        let mut input = Input { code, at: 0 };
        let mut f = Frame::default();
        loop {
            let op = input.byte()?;
            let made = match op {
                0x80 => {
                    input.byte()?;
                    continue;
                }
                0x95 => {
                    input.take(8)?;
                    continue;
                }
                b'.' => return Ok((f.pop()?, input.at)),
                b'(' => {
                    f.marks.push(f.stack.len());
                    continue;
                }
                b'0' => {
                    f.pop()?;
                    continue;
                }
                b'1' => {
                    f.pop_mark()?;
                    continue;
                }
                b'2' => f.top()?,
                b'q' | b'r' | 0x94 => {
                    let key = match op {
                        b'q' => u64::from(input.byte()?),
                        b'r' => input.number(4)?,
                        _ => f.memo.len() as u64,
                    };
                    let top = f.top()?;
                    f.memo.insert(key, top);
                    continue;
                }
                b'h' | b'j' => {
                    let key = input.number(if op == b'h' { 1 } else { 4 })?;
                    *f.memo.get(&key).ok_or_else(|| bad("a pickle that recalls what it never stored"))?
                }
                b'N' => self.make(Value::Other),
                0x88 => self.make(Value::Int(1)),
                0x89 => self.make(Value::Int(0)),
                b'K' | b'M' => {
                    let n = input.number(if op == b'K' { 1 } else { 2 })?;
                    self.make(Value::Int(n as i64))
                }
                b'J' => {
                    let n = input.number(4)? as u32 as i32;
                    self.make(Value::Int(i64::from(n)))
                }
                0x8A => {
                    let len = usize::from(input.byte()?);
                    let bytes = input.take(len)?;
                    let n = (len <= 8).then(|| {
                        let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xFF } else { 0 };
                        let mut wide = [sign; 8];
                        wide[..len].copy_from_slice(bytes);
                        Value::Int(i64::from_le_bytes(wide))
                    });
                    self.make(n.unwrap_or(Value::Other))
                }
                b'G' => {
                    input.take(8)?;
                    self.make(Value::Other)
                }
                b'X' | 0x8C | 0x8D => {
                    let len = input.number(match op {
                        b'X' => 4,
                        0x8C => 1,
                        _ => 8,
                    })?;
                    let text = String::from_utf8_lossy(input.take_long(len)?).into_owned();
                    self.make(Value::Text(text))
                }
                b'U' | b'C' | b'T' | b'B' => {
                    let len = input.number(if matches!(op, b'U' | b'C') { 1 } else { 4 })?;
                    let text = String::from_utf8_lossy(input.take_long(len)?).into_owned();
                    self.make(Value::Text(text))
                }
                b'c' => {
                    let (module, name) = (input.line()?, input.line()?);
                    self.make(Value::Global(format!("{module} {name}")))
                }
                0x93 => {
                    let (name, module) = (f.pop()?, f.pop()?);
                    let joined = self.text(module).zip(self.text(name)).map(|(m, n)| format!("{m} {n}"));
                    self.make(joined.map_or(Value::Other, Value::Global))
                }
                b']' | b')' => self.make(Value::Sequence(Vec::new())),
                b'}' => self.make(Value::Dict(Vec::new())),
                b't' | b'l' => {
                    let items = f.pop_mark()?;
                    self.make(Value::Sequence(items))
                }
                0x85..=0x87 => {
                    let count = usize::from(op - 0x84);
                    let from = f.stack.len().checked_sub(count).ok_or_else(underflow)?;
                    let items = f.stack.split_off(from);
                    self.make(Value::Sequence(items))
                }
                b'd' => {
                    let items = f.pop_mark()?;
                    let dict = self.make(Value::Dict(Vec::new()));
                    self.set(dict, &items);
                    dict
                }
                b'a' | b'e' => {
                    let items = if op == b'a' { vec![f.pop()?] } else { f.pop_mark()? };
                    let list = f.top()?;
                    self.append(list, items);
                    continue;
                }
                b's' | b'u' => {
                    let items = if op == b's' {
                        let value = f.pop()?;
                        vec![f.pop()?, value]
                    } else {
                        f.pop_mark()?
                    };
                    let dict = f.top()?;
                    self.set(dict, &items);
                    continue;
                }
                b'b' => {
                    // Attributes, such as a state dict's `_metadata`: tensors have none that matter.
                    f.pop()?;
                    continue;
                }
                b'R' | 0x81 => {
                    let (arguments, function) = (f.pop()?, f.pop()?);
                    self.call(function, arguments)
                }
                b'Q' => {
                    let id = f.pop()?;
                    self.storage(id)
                }
                _ => return Err(bad(format!("a pickle with the unknown instruction {op:#04x}"))),
            };
            f.stack.push(made);
        }
    }

    /// The views of the dictionary that is meant.
    fn select(
        &self,
        top: Id,
        holders: &[&str],
        wanted: impl Fn(&str) -> bool,
    ) -> Result<BTreeMap<String, View>, TrainError> {
        let tensors = |id: Id| -> BTreeMap<String, View> {
            let Value::Dict(entries) = self.get(id) else { return BTreeMap::new() };
            let named = entries.iter().filter_map(|(k, v)| match (self.get(*k), self.get(*v)) {
                (Value::Text(name), Value::Tensor(view)) => Some((name.clone(), view.clone())),
                _ => None,
            });
            named.collect()
        };
        let mut candidates = vec![top];
        if let Value::Dict(entries) = self.get(top) {
            let held = |h: &&str| entries.iter().find(|(k, _)| self.text(*k) == Some(h)).map(|(_, v)| *v);
            candidates.extend(holders.iter().filter_map(held));
        }
        let found = candidates.into_iter().map(tensors).find(|t| t.keys().any(|name| wanted(name)));
        found.ok_or_else(|| bad("no dictionary of this network's tensors at the top or where trainers keep it"))
    }
}

fn underflow() -> TrainError {
    bad("a pickle that takes more than there is")
}

impl Frame {
    fn pop(&mut self) -> Result<Id, TrainError> {
        self.stack.pop().ok_or_else(underflow)
    }

    fn top(&self) -> Result<Id, TrainError> {
        self.stack.last().copied().ok_or_else(underflow)
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, TrainError> {
        let mark = self.marks.pop().filter(|m| *m <= self.stack.len()).ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }
}

struct Input<'a> {
    code: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], TrainError> {
        let part = self.code.get(self.at..).and_then(|rest| rest.get(..n));
        self.at += n;
        part.ok_or_else(|| bad("a pickle that is cut short"))
    }

    fn take_long(&mut self, n: u64) -> Result<&'a [u8], TrainError> {
        self.take(usize::try_from(n).unwrap_or(usize::MAX / 2).min(usize::MAX / 2))
    }

    fn byte(&mut self) -> Result<u8, TrainError> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian number of `n` bytes, at most 8.
    fn number(&mut self, n: usize) -> Result<u64, TrainError> {
        Ok(self.take(n)?.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    fn line(&mut self) -> Result<String, TrainError> {
        let rest = self.code.get(self.at..).unwrap_or_default();
        let end = rest.iter().position(|b| *b == b'\n').ok_or_else(|| bad("a pickle that is cut short"))?;
        self.at += end + 1;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> Vec<u8> {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/train").join(name)).unwrap()
    }

    fn read_bytes(bytes: &[u8]) -> Result<Named, TrainError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path(), &["state_dict"], |name| name.ends_with("fc.bias"))
    }

    #[test]
    fn both_formats_hold_the_same_tensors() {
        let (new, old) = (read_bytes(&golden("state.pth")).unwrap(), read_bytes(&golden("legacy.pth")).unwrap());
        assert_eq!(new.len(), old.len());
        for (name, tensor) in &old {
            assert_eq!(tensor, &new[&format!("module.{name}")], "{name}");
        }
        assert_eq!(old["fc.bias"].shape, [3]);
        assert_eq!(old["stem.1.num_batches_tracked"].kind, Kind::I64);
    }

    #[test]
    fn a_damaged_file_is_an_error_wherever_it_is_cut_or_changed() {
        for name in ["state.pth", "legacy.pth"] {
            let whole = golden(name);
            for part in 0..40 {
                let _ = read_bytes(&whole[..whole.len() * part / 40]).unwrap_err();
            }
            for i in 0..400 {
                let mut changed = whole.clone();
                let at = (i * 7919) % whole.len().min(20_000);
                changed[at] ^= 1 << (i % 8);
                // Right or wrong, but no panic.
                let _ = read_bytes(&changed);
            }
        }
    }

    #[test]
    fn a_call_of_anything_else_is_not_made() {
        // protocol 2, posix.system("true"), under the key "x" of a dict
        let code = b"\x80\x02}X\x01\x00\x00\x00xcposix\nsystem\nX\x04\x00\x00\x00true\x85Rs.";
        let mut machine = Machine::default();
        let (top, used) = machine.run(code).unwrap();
        assert_eq!(used, code.len());
        let Value::Dict(entries) = machine.get(top) else { panic!("a dict was expected") };
        assert_eq!(machine.get(entries[0].1), &Value::Other);
    }

    #[test]
    fn a_view_is_gathered_by_its_strides_and_never_beyond_its_storage() {
        let storage: Vec<u8> = (0..6u32).flat_map(|v| (v as f32).to_le_bytes()).collect();
        let view = |shape: &[usize], strides: &[usize], offset| View {
            kind: Kind::F32,
            key: String::new(),
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        let values = |v: &View| -> Vec<f32> {
            let t = gather("t", v, &storage).unwrap();
            t.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        assert_eq!(values(&view(&[3, 2], &[1, 3], 0)), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(values(&view(&[2], &[2], 1)), [1.0, 3.0]);
        assert_eq!(values(&view(&[], &[], 5)), [5.0]);
        assert_eq!(values(&view(&[0, 4], &[1, 1], 0)), [0.0f32; 0]);
        for wrong in [view(&[7], &[1], 0), view(&[2], &[1], 5), view(&[9, 9], &[0, 0], 0)] {
            assert!(gather("t", &wrong, &storage).is_err());
        }
        assert!(gather("t", &view(&[usize::MAX, 2], &[1, usize::MAX], 0), &storage).is_err());
    }
}
