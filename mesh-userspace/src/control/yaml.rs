//! From text to trees of values that remember their place. Bounded in every direction; no aliases, so what is read is
//! never larger than what was written.

use super::Code;
use super::diagnostic::{Findings, Position};
use serde_saphyr::granit_parser::{self, Event, Parser, ScalarStyle, ScanError, Span, StrInput};

/// Documents in one file.
const MAX_DOCUMENTS: usize = 10_000;
/// Scalars, sequences and mappings in one document.
const MAX_NODES: usize = 20_000;
/// Sequences and mappings within each other.
const MAX_DEPTH: usize = 40;

/// A value and its place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    Null,
    /// `true`, `false` and what other YAML readers take for them (`yes`, `off`, ...), unquoted.
    Bool(String),
    /// Unquoted text that reads as a number, integer or not.
    Number(String),
    Text(String),
    Sequence(Vec<Node>),
    /// In the order of the file, keys unique.
    Mapping(Vec<Entry>),
    /// A mapping that breaks off, with what came before; only in what is left of a broken document.
    Torn(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) at: Position,
    pub(super) value: Node,
}

impl Value {
    /// What the value is, in the words of an error.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "nothing".to_owned(),
            Self::Bool(text) => format!("the boolean `{text}`"),
            Self::Number(text) => format!("the number `{}`", text.chars().take(40).collect::<String>()),
            Self::Text(_) => "a string".to_owned(),
            Self::Sequence(_) => "a list".to_owned(),
            Self::Mapping(_) | Self::Torn(_) => "a mapping".to_owned(),
        }
    }
}

impl Node {
    /// The value of a field, of a torn mapping as well; `None` if this is no mapping.
    pub(super) fn field(&self, name: &str) -> Option<&Self> {
        let (Value::Mapping(entries) | Value::Torn(entries)) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == name).map(|entry| &entry.value)
    }

    pub(super) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// Why a document gives no tree, which has been reported; with what could be read before, if it was a mapping.
pub(super) struct Broken(pub(super) Option<Node>);

/// Reads every document of a file. A broken one is reported; the others are still read. Documents without content are
/// left out.
pub(super) fn read(text: &str, findings: &mut Findings) -> Vec<Result<Node, Broken>> {
    let options = granit_parser::options! { emit_comments: false, emit_unresolved_aliases: true };
    let mut reader = Reader { parser: Parser::new_from_str_with_options(text, options), nodes: 0, findings };
    let mut documents = Vec::new();
    loop {
        let document = match reader.document() {
            Ok(Next::Document(Node { value: Value::Null, .. })) => continue,
            Ok(Next::Document(node)) => Ok(node),
            Ok(Next::End) => return documents,
            Err(broken) => Err(broken),
        };
        let recovered = document.is_ok() || reader.parser.proceed_next_document().is_ok_and(|more| more);
        documents.push(document);
        if !recovered {
            return documents;
        }
        if documents.len() >= MAX_DOCUMENTS {
            let message = format!("the file has more than {MAX_DOCUMENTS} documents");
            reader.findings.report(Code::Limit, Position::FILE, message, Some("split the file".into()));
            documents.push(Err(Broken(None)));
            return documents;
        }
    }
}

enum Next {
    Document(Node),
    End,
}

struct Reader<'input, 'findings> {
    parser: Parser<'input, StrInput<'input>>,
    /// Nodes of the document at hand so far.
    nodes: usize,
    findings: &'findings mut Findings,
}

impl<'input> Reader<'input, '_> {
    fn document(&mut self) -> Result<Next, Broken> {
        self.nodes = 0;
        loop {
            match self.event()? {
                None | Some((Event::StreamEnd, _)) => return Ok(Next::End),
                Some((Event::StreamStart | Event::DocumentStart(..), _)) => {}
                Some((event, span)) => {
                    let node = self.node(event, span, 0)?;
                    return match self.event()? {
                        Some((Event::DocumentEnd, _)) => Ok(Next::Document(node)),
                        _ => Err(self.unsupported(span, "content after the document's value")),
                    };
                }
            }
        }
    }

    fn event(&mut self) -> Result<Option<(Event<'input>, Span)>, Broken> {
        match self.parser.next_event() {
            None => Ok(None),
            Some(Ok(event)) => Ok(Some(event)),
            Some(Err(error)) => Err(self.syntax(&error)),
        }
    }

    fn node(&mut self, event: Event<'input>, span: Span, depth: usize) -> Result<Node, Broken> {
        let at = position(span);
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(self.limit(at, format!("the document has more than {MAX_NODES} values")));
        }
        if depth > MAX_DEPTH {
            return Err(self.limit(at, format!("values are nested more than {MAX_DEPTH} deep")));
        }
        if event.anchor_id().is_some() {
            return Err(self.unsupported(span, "an anchor (`&name`)"));
        }
        if event.tag().is_some() {
            return Err(self.unsupported(span, "a tag (`!name`)"));
        }
        let value = match event {
            Event::Scalar(text, style, ..) => scalar(&text, style),
            Event::SequenceStart(..) => self.sequence(depth)?,
            Event::MappingStart(..) => {
                let mut entries = Vec::new();
                if self.mapping(depth, &mut entries).is_err() {
                    return Err(Broken(Some(Node { at, value: Value::Torn(entries) })));
                }
                Value::Mapping(entries)
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                return Err(self.unsupported(span, "an alias (`*name`)"));
            }
            _ => return Err(self.unsupported(span, "an unexpected structure")),
        };
        Ok(Node { at, value })
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, Broken> {
        let mut items = Vec::new();
        loop {
            match self.event()? {
                None | Some((Event::SequenceEnd, _)) => return Ok(Value::Sequence(items)),
                // Half a list is worse than none: it would look like a shorter one.
                Some((event, span)) => items.push(self.node(event, span, depth + 1).map_err(|_| Broken(None))?),
            }
        }
    }

    /// Adds the mapping's entries, of one that breaks off those before; the last one may be torn itself.
    fn mapping(&mut self, depth: usize, entries: &mut Vec<Entry>) -> Result<(), Broken> {
        let mut seen = std::collections::HashMap::new();
        loop {
            let (event, span) = match self.event()? {
                None | Some((Event::MappingEnd, _)) => return Ok(()),
                Some(event) => event,
            };
            let key = self.node(event, span, depth + 1).map_err(|_| Broken(None))?;
            let at = key.at;
            let key = match key.value {
                Value::Text(key) | Value::Number(key) | Value::Bool(key) => key,
                other => {
                    let message = format!("a key must be a string, found {}", other.describe());
                    self.findings.report(Code::WrongType, at, message, None);
                    return Err(Broken(None));
                }
            };
            if key == "<<" {
                return Err(self.unsupported(span, "a merge key (`<<`)"));
            }
            if let Some(first) = seen.insert(key.clone(), at.line) {
                let message = format!("the key `{key}` appears twice in one mapping");
                self.findings.report(Code::DuplicateKey, at, message, Some(format!("it is first set in line {first}")));
                return Err(Broken(None));
            }
            let Some((event, span)) = self.event()? else { return Ok(()) };
            match self.node(event, span, depth + 1) {
                Ok(value) => entries.push(Entry { key, at, value }),
                Err(Broken(rest)) => {
                    entries.push(Entry { key, at, value: rest.unwrap_or(Node { at, value: Value::Null }) });
                    return Err(Broken(None));
                }
            }
        }
    }

    fn syntax(&mut self, error: &ScanError) -> Broken {
        let at = Position {
            line: number(error.marker().line()),
            column: number(error.marker().col()).saturating_add(1),
            width: 1,
        };
        let mut message = error.info();
        if message.is_empty() {
            message.push_str("not valid YAML");
        }
        let line = self.findings.source.line(at.line).unwrap_or_default();
        let tab = line.bytes().take_while(u8::is_ascii_whitespace).any(|byte| byte == b'\t');
        self.findings.report(Code::Syntax, at, message, tab.then(|| "indent with spaces, not tabs".to_owned()));
        Broken(None)
    }

    fn limit(&mut self, at: Position, message: String) -> Broken {
        self.findings.report(Code::Limit, at, message, None);
        Broken(None)
    }

    fn unsupported(&mut self, span: Span, what: &str) -> Broken {
        let help = Some("write the value out".to_owned());
        self.findings.report(Code::Unsupported, position(span), format!("{what} is not supported in catalogs"), help);
        Broken(None)
    }
}

fn number(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn position(span: Span) -> Position {
    let one_line = span.start.line() == span.end.line();
    let width = if one_line { number(span.len()).max(1) } else { 1 };
    Position { line: number(span.start.line()), column: number(span.start.col()).saturating_add(1), width }
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::Text(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        _ if is_boolean(text) => Value::Bool(text.to_owned()),
        _ if is_number(text) => Value::Number(text.to_owned()),
        _ => Value::Text(text.to_owned()),
    }
}

/// YAML 1.1's booleans, which Kubernetes' reader still takes for booleans, in the three spellings it knows.
fn is_boolean(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let spelt = text == lower
        || text.bytes().all(|byte| byte.is_ascii_uppercase())
        || (text.starts_with(|c: char| c.is_ascii_uppercase()) && text[1..] == lower[1..]);
    spelt && matches!(lower.as_str(), "true" | "false" | "yes" | "no" | "on" | "off")
}

fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let radix = |prefix: &str, is_digit: fn(char) -> bool| {
        digits.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.chars().all(is_digit))
    };
    let decimal = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') && text.parse::<f64>().is_ok();
    let named = matches!(digits.to_ascii_lowercase().as_str(), ".inf" | ".nan");
    decimal || named || radix("0x", |c| c.is_ascii_hexdigit()) || radix("0o", |c| c.is_digit(8))
}

#[cfg(test)]
mod tests {
    use super::super::diagnostic::Source;
    use super::*;

    type Found = (Code, u32, u32);

    fn read_all(text: &str) -> (Vec<Option<Node>>, Vec<Found>) {
        let mut findings = Findings::new(Source::new("x.yaml", text));
        let documents = read(text, &mut findings).into_iter().map(Result::ok).collect();
        (documents, findings.into_diagnostics().into_iter().map(|d| (d.code, d.line, d.column)).collect())
    }

    #[test]
    fn scalars_are_what_kubernetes_takes_them_for() {
        let kind = |text: &str| match scalar(text, ScalarStyle::Plain) {
            Value::Null => "null",
            Value::Bool(_) => "bool",
            Value::Number(_) => "number",
            _ => "text",
        };
        for (expected, texts) in [
            ("null", &["", "~", "null"][..]),
            ("bool", &["true", "False", "NO", "yes", "Off"]),
            ("number", &["1", "-3", "1.10", "1e3", "0x1F", "0o17", ".5", ".inf", "007"]),
            ("text", &["10.0.0.1", "nan", "inf", "a", "fd00::1", "tRuE", "1.2.3", "-", "0xg", "v1", "+"]),
        ] {
            for text in texts {
                assert_eq!(kind(text), expected, "{text:?}");
            }
        }
        assert!(matches!(scalar("80", ScalarStyle::DoubleQuoted), Value::Text(_)));
    }

    #[test]
    fn a_broken_document_does_not_take_the_others_with_it() {
        let (documents, found) = read_all("a: 1\n---\nb: [1, 2\n---\nc: 3\n---\n# nothing\n---\nd: 4\n");
        assert_eq!(documents.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true, true]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, Code::Syntax);
        for open in ["\"x", "'x", "{x", "[x, \"", "|\n  x", ">\n x"] {
            let (documents, _) = read_all(&format!("a: {open}\n---\nb: 1\n"));
            assert!(documents.len() == 2 && documents[1].is_some(), "{open}");
        }
    }

    #[test]
    fn of_a_broken_document_there_is_what_came_before() {
        let read = |text: &str| {
            let mut findings = Findings::new(Source::new("x.yaml", text));
            let Some(Err(Broken(Some(rest)))) = read(text, &mut findings).into_iter().next() else { panic!("{text}") };
            rest
        };
        let rest = read("a: {b: one, c: {d: [1, 2], e: [1, 2\n");
        let inner = rest.field("a").and_then(|a| a.field("c")).unwrap();
        assert_eq!(rest.field("a").and_then(|a| a.field("b")).and_then(Node::text), Some("one"));
        assert!(matches!(&inner.field("d").unwrap().value, Value::Sequence(items) if items.len() == 2));
        // A list that breaks off is not there at all.
        assert!(inner.field("e").is_none_or(|e| matches!(e.value, Value::Null)));
        assert!(matches!((&rest.value, &inner.value), (Value::Torn(_), Value::Torn(_))));
        let rest = read("a: one\na: two\n");
        assert_eq!(rest.field("a").and_then(Node::text), Some("one"));
    }

    #[test]
    fn places_count_from_one_and_in_characters() {
        let (documents, _) = read_all("ключ: [значение, x]\n");
        let Some(Node { value: Value::Mapping(entries), .. }) = &documents[0].as_ref() else { panic!() };
        assert_eq!((entries[0].at.line, entries[0].at.column, entries[0].at.width), (1, 1, 4));
        let Value::Sequence(items) = &entries[0].value.value else { panic!() };
        assert_eq!((items[1].at.column, items[1].at.width), (18, 1));
    }

    #[test]
    fn what_multiplies_or_nests_without_end_is_refused() {
        let deep = format!("a: {}1{}", "[".repeat(100), "]".repeat(100));
        let wide = format!("a: [{}]", "1,".repeat(MAX_NODES + 1));
        let many = "a: 1\n---\n".repeat(MAX_DOCUMENTS + 1);
        for (text, code) in [
            ("a: &x 1\nb: *x\n", Code::Unsupported),
            ("b: *x\n", Code::Unsupported),
            ("a: !secret 1\n", Code::Unsupported),
            ("a: {<<: {b: 1}}\n", Code::Unsupported),
            ("a: 1\na: 2\n", Code::DuplicateKey),
            ("[1]: 2\n", Code::WrongType),
            (&deep, Code::Limit),
            (&wide, Code::Limit),
            (&many, Code::Limit),
        ] {
            let (documents, found) = read_all(text);
            assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [code], "{}", &text[..text.len().min(40)]);
            assert!(documents.last().unwrap().is_none());
        }
    }
}
