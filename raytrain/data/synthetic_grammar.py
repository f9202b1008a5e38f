"""The words and templates of the embedded synthetic corpus; synthetic.py says what they mean."""

from __future__ import annotations

WORDS: dict[str, str] = {
    "name": "Sam|Anna|Tom|Maria|Ben|Lucy|James|Emma|Jack|Sara|Leo|Kate|Omar|Nina|Paul|Zoe|Ravi|Ella|Hugo|Ruth",
    "kin": "mum|dad|my sister|my brother|grandma|my cousin|my flatmate|my neighbour|my uncle|my aunt",
    "city": "London|Paris|Berlin|Leeds|Dublin|Madrid|Rome|Oslo|Boston|Chicago|Vienna|Bristol|Prague|Lisbon|Glasgow",
    "place": "the park|the beach|the library|the market|the station|the gym|the office|the airport|the river|town",
    "good": "great|lovely|brilliant|perfect|amazing|really good|wonderful|fantastic|so much fun|magic",
    "bad": "awful|terrible|boring|a disaster|a joke|rubbish|really bad|a nightmare|painful|so slow",
    "feeling": "happy|tired|excited|hungry|proud|nervous|relaxed|grateful|cold|sleepy|confused|bored",
    "sky": "rain|sun|snow|wind|fog|thunder|drizzle|hail|frost|mist",
    "team": "City|United|Rovers|the Lions|the Hawks|Athletic|the Bears|Wanderers|the Tigers|the Wolves",
    "position": "striker|keeper|captain|new signing|left back|defender|referee|coach",
    "food": "pizza|curry|pasta|soup|tacos|sushi|pancakes|noodles|burgers|fish and chips|salad|dumplings|toast|pie",
    "drink": "coffee|tea|water|hot chocolate|orange juice|lemonade|iced tea|milk",
    "cake": "banana bread|carrot cake|brownies|scones|apple crumble|cookies|cheesecake|muffins",
    "animal": "dog|cat|rabbit|hamster|parrot|puppy|kitten|tortoise",
    "pet": "Biscuit|Luna|Milo|Daisy|Rex|Pepper|Oscar|Molly",
    "artist": "the Night Owls|Paper Boats|Silver Lane|the Kites|Blue Harbour|Echo Street|Marla Reed|the Foxes",
    "style": "jazz|rock|folk|indie|soul|techno|blues|country",
    "instrument": "guitar|piano|drums|violin|bass|ukulele|cello|trumpet",
    "film": "comedy|thriller|documentary|horror film|western|musical|cartoon|love story",
    "task": "a report|some emails|the slides|a deadline|the budget|an interview|a code review|paperwork",
    "subject": "maths|history|physics|biology|French|chemistry|geography|economics",
    "item": "shoes|jeans|headphones|a jacket|a lamp|a phone case|a backpack|sunglasses|a kettle|a bike",
    "device": "phone|laptop|printer|tablet|camera|keyboard|watch|charger",
    "exercise": "yoga|swimming|running|cycling|squats|boxing|climbing|pilates",
    "issue": "housing|transport|climate|health|schools|jobs|energy|taxes",
    "person": "the mayor|the minister|the council|the police|the union|a spokesman|the court|the senate",
    "plant": "tomatoes|roses|basil|tulips|sunflowers|herbs|potatoes|lavender",
    "colour": "blue|green|white|yellow|grey|pink|red|orange",
    "season": "spring|summer|autumn|winter",
    "when": "today|tonight|this morning|tomorrow|yesterday|this week|this afternoon|on the way home",
    "soon": "tomorrow|tonight|next week|soon|later|at the weekend|next month|in the morning",
    "activity": "reading|cooking|sleeping|dancing|drawing|hiking|gaming|baking|gardening|knitting",
}
"""Zipf-like choices, the most likely first."""

NUMBERS: dict[str, str] = {
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "hour": "1|2|3|4|5|6|7|8|9|10|11|12",
    "minute": "|".join(f"{minute:02}" for minute in range(60)),
    "goal": "0|1|2|3|4",
    "few": "2|3|4|5|6|7|8|9",
    "count": "|".join(str(count) for count in range(10, 100)),
}
"""Uniform choices."""

ADDRESS: tuple[tuple[str, float], ...] = (("", 0.66), ("@userid ", 0.24), ("RT @userid: ", 0.1))
EXCLAMATION: tuple[tuple[str, float], ...] = (
    ("", 0.8),
    ("Wow! ", 0.06),
    ("Yes! ", 0.05),
    ("Ugh! ", 0.05),
    ("Haha! ", 0.04),
)
MARK: tuple[tuple[str, float], ...] = (("", 0.4), ("!", 0.3), (".", 0.18), ("...", 0.07), ("!!!", 0.05))
LINK: tuple[tuple[str, float], ...] = (("", 0.86), (" url", 0.14))
COMMON_EMOJI = "😀|✨|🙈|💙"
COMMON_TAGS = "life|mood|today|tbt|fail|win|photo|lol"
NO_EMOJI = 0.5
NO_TAG = 0.5
NO_COMMON_TAG = 0.7

TOPICS: dict[str, str] = {
    "weather": """
        ☀️|🌧️|❄️|🌈
        weather|rain|sunshine|forecast
        So much {sky} in {city} {when}
        The {sky} in {city} is {bad} [and I forgot my coat]
        It is {season} and there is still {sky} in {city}
        Is it ever going to stop with the {sky}?
        Woke up to {sky} again[, staying in bed]
        More {sky} expected in {city} on {day}
        The sky over {city} is {colour} {when}
        {sky} and {sky} all {day}, typical {season}
        First {sky} of the {season}, feeling {feeling}
        Minus {few} degrees in {city} [and the heating is broken]
        {count} degrees in {city}! Off to {place}
        Walking to {place} in the {sky} was {bad}
        Anyone else love the sound of {sky} at night?
    """,
    "football": """
        ⚽|🏆|🔥|😡
        football|matchday|goal|derby|cup
        What a goal from the {position}! {goal}-{goal}
        {team} {goal}-{goal} {team}[, what a match]
        Full time: {team} {goal} {team} {goal}
        Come on {team}[, we can still win this]
        The {position} was {bad} {when}
        The {position} was {good} {when}
        Off to see {team} play {team} on {day}
        Kick off at {hour}:{minute}, feeling {feeling}
        How did {team} lose that?
        {team} need a new {position}[, and fast]
        Penalty in minute {count}, that {position} is {good}
        Watching {team} with {kin} and {food}
        Did the {position} even see that?
        Still cannot believe {team} won in {city}
    """,
    "food": """
        😋|🍕|🍰|☕
        food|foodie|dinner|baking|yum
        {food} for dinner again[ and I am not sorry]
        Made {cake} with {kin}, it was {good}
        Best {food} in {city}, go now
        I could eat {food} every {day}
        Who wants {food} {when}?
        Need {drink} before I talk to anyone
        {drink} and {cake}, what more do you need
        Burnt the {cake}, so it is {food} for dinner
        Trying to make {food} like {kin}, results were {bad}
        {name} made {cake} [for the whole office]
        Is {drink} at {hour}:{minute} a bad idea?
        Lunch with {name}: {food} and {drink}
        The {cake} at {place} is {good}
        Craving {food} so badly right now
    """,
    "trains": """
        🚆|😤|🚌|😴
        commute|delays|trains|travel
        The {hour}:{minute} to {city} is late again[, thanks for nothing]
        Train to {city} delayed by {count} minutes
        Stuck outside {city} for {count} minutes, no news
        No seats on the {hour}:{minute} from {city} [as always]
        Why is the {hour}:{minute} always cancelled?
        Missed the last bus to {place}, now I am {feeling}
        The commute from {city} was {bad} {when}
        A man on the train is eating {food} at {hour} in the morning
        Left my {device} on the bus to {place}
        Bus full, walking to {place} in the {sky}
        Finally a train on time, {city} here I come
        {count} pounds for a ticket to {city}? No thanks
        Due to {sky} there are no trains to {city}
    """,
    "music": """
        🎶|🎸|❤️|🎧
        music|nowplaying|gig|newmusic
        Now playing: {artist} [live in {city}]
        The new album by {artist} is {good}
        {artist} in {city} on {day}, who is coming?
        Tickets for {artist} sold out in {few} minutes
        Listening to {style} on the way to {place}
        Started learning the {instrument}, my neighbours are {feeling}
        {kin} plays the {instrument} at {hour} in the morning
        Can anyone recommend some {style}?
        That {instrument} solo was {good}
        Nothing like {style} and {drink} on a {day}
        {artist} were {good} {when}
        {artist} were {bad} {when}
        Cannot stop singing that song by {artist}
    """,
    "work": """
        😩|💻|☕|🙌
        work|worklife|deadline|office
        Still at work, {task} to finish [before {hour}]
        Spent all {day} on {task}[ and nobody read it]
        Meeting at {hour}:{minute}, could have been an email
        My boss wants {task} by {day}
        Is it {day} yet?
        {few} more hours of work, then {food}
        Forgot about {task}, feeling {feeling}
        New job starts on {day}, so {feeling}
        Working from home with the {animal} is {good}
        Working from home with the {animal} is {bad}
        Last day at work before the holidays, {feeling}
        {name} sent {task} at {hour}:{minute} in the morning
        My {device} died in the middle of {task}
    """,
    "news": """
        📰|🚨|👀|🤔
        news|breaking|politics|vote
        Breaking: {person} to speak about {issue} at {hour}:{minute}
        {person} says {issue} is the top priority
        New plan for {issue} in {city} [rejected by {person}]
        {count} percent of voters worry about {issue}
        Protest in {city} over {issue} on {day}
        What is {person} going to do about {issue}?
        Fire near {place} in {city}, roads closed
        {city} votes on {issue} {soon}
        Road closed in {city} after {sky}
        {person} and {person} disagree on {issue}
        Read this on {issue} in {city}
        Report: {issue} costs {city} {count} million a year
    """,
    "pets": """
        🐶|🐱|😍|🐾
        pets|dogs|cats|cute
        {pet} the {animal} is asleep on my {device} again
        My {animal} just ate my {food}[ and looks proud]
        Took {pet} to {place} and now we are both {feeling}
        Happy birthday to my {animal} {pet}, {few} today
        Meet {pet}, our new {animal}
        {pet} hates the {sky}
        Why does my {animal} wake me at {hour}:{minute}?
        Lost {animal} near {place} in {city}, please share
        {pet} is not {feeling} about the vet
        I want a {animal} so badly
        {kin} bought a {animal} called {pet}
        The {animal} next door is {good}
    """,
    "thanks": """
        🙏|❤️|😊|🎉
        thanks|thankyou|grateful|ff
        Thank you so much for the {cake}[, you are too kind]
        Thanks for the follow[, have a great {day}]
        Thanks {name}, that was {good}
        Big thanks to {name} for the {instrument} lesson
        Thanks to everyone who came to {place} {when}
        Thank you {city}, you were {good}
        Thanks for the tip, will try {food} {soon}
        So {feeling} and thankful for {name} and {name}
        Many thanks for all the birthday messages
        Thanks for helping me with {task}
        Cheers {name}, see you {soon}
        You are welcome, {name}
    """,
    "questions": """
        🤔|👀|😅|🙋
        help|question|advice|askme
        Does anyone know how to fix a {device}?
        Where can I get good {food} in {city}?
        What time does {place} open on {day}?
        Anyone going to {city} {soon}?
        Anyone free for {drink} {soon}?
        Should I buy {item} in {colour} or {colour}?
        Which is better, {activity} or {activity}?
        Has anyone seen my {device}?
        Can somebody explain {subject} to me?
        Who else is {feeling} {when}?
        How long does it take from {city} to {city}?
        What do you all do on a {day} night?
    """,
    "school": """
        📚|😭|🎓|😴
        exams|school|student|revision
        {subject} exam {soon} and I know nothing
        {few} hours of {subject} [and I still do not get it]
        Passed my {subject} exam[, drinks on me]
        Our {subject} teacher is {good}
        Our {subject} teacher is {bad}
        Who has the notes for {subject}?
        Fell asleep in {subject} again
        Homework: {subject}, {subject} and more {subject}
        Library until {hour} with {name} and {drink}
        No school on {day}, so {feeling}
        Revision is {bad}, give me {food}
        Only {count} days until the holidays
    """,
    "family": """
        ❤️|😂|👶|🥰
        family|mumlife|sunday|love
        {kin} just called to talk about {sky}
        {kin} still cannot use a {device}[, help]
        Dinner with {kin} and {name}: {food}, of course
        Helping {kin} move to {city} on {day}
        {name} took the first steps {when}
        {kin} is {activity} and I am {activity}
        Missing {kin} a lot {when}
        {kin} thinks I should try {activity}
        My niece drew me with {colour} hair
        Happy birthday {name}[, have a lovely day]
        {name} turns {count} on {day}
        Family {day} with {cake} and {film} night
    """,
    "shopping": """
        🛍️|💸|👟|😍
        shopping|sale|deal|fashion
        Bought {item} instead of paying rent
        {item} with {count} percent off, only on {day}
        Went out for milk, came back with {item}
        Finally found {item} in {colour}
        Ordered {item} {few} weeks ago, still waiting
        The queue at {place} is {bad}
        Do I really need {item}?
        Everyone in {city} is wearing {colour}
        Sold my {device} to buy {item}
        Win {item}! Follow and share to enter
        Wrong size again, sending back {item}
        Saving up for {item}, {few} months to go
    """,
    "travel": """
        ✈️|🏖️|😎|🌍
        holiday|travel|wanderlust|views
        {few} days until {city}, so {feeling}
        Hello {city}[, you look {good}]
        Goodbye {city}, back home {soon}
        Flight to {city} at {hour}:{minute} in the morning
        Sunset over {place} in {city} is {good}
        Already planning a trip to {city} with {name}
        Lost my bag between {city} and {city}
        Take me back to {city} [and the {food}]
        Best view in {city}: from {place}
        Packing for {city}: {item} and {item}
        Which part of {city} should I stay in?
        {city} in {season} is {good}
    """,
    "films": """
        🎬|🍿|😱|📺
        film|movies|netflix|oscars|tv
        Watching a {film} with {name} {when}
        That {film} was {good}[, no spoilers please]
        That {film} was {bad}[, I want my money back]
        Fell asleep {count} minutes into the {film}
        Any good {film} to watch {soon}?
        {few} episodes in one night, now I am {feeling}
        {kin} cried at a {film}
        The book was better than the {film}
        A {film} about a {animal}? Count me in
        Popcorn and a {film}, ideal {day}
        Why is every {film} set in {city}?
        Season {few} is out on {day}
    """,
    "health": """
        💪|🏃|😅|🥵
        fitness|gym|running|health|run
        {few} miles before breakfast, feeling {feeling}
        {exercise} on {day}, cannot walk on {day}
        {exercise} with {name} at {hour}:{minute} [was {bad}]
        Signed up for {exercise}, what was I thinking
        Ran to {place} and back in {count} minutes
        New best time: {count} minutes
        Headache all {day}, {drink} and bed
        No {cake} until {season}, starting {soon}
        {count} minutes of {exercise} and then {food}
        Does {activity} count as {exercise}?
        Doctor says more {exercise}, less {cake}
        Got a cold again, {feeling} and {feeling}
    """,
    "home": """
        🌱|🏡|🧹|🌻
        garden|home|diy|spring
        My {plant} are finally growing
        Planted {plant} and {plant} with {kin}
        Painting the kitchen {colour} {when}
        Cleaning the house with {style} on full volume
        The neighbours are {activity} at {hour}:{minute} again
        No hot water since {day}[, how are you]
        Slugs ate all my {plant}
        The {device} is broken and so am I
        {plant} from the garden, {food} from the oven
        Is {colour} a good colour for a bedroom?
        Moved {item} and {item} up {few} floors
        Power cut in {city} since {hour}:{minute}
    """,
    "tech": """
        🤖|💻|📱|😤
        tech|coding|startup|app|gadgets
        My {device} needs {few} updates before {drink}
        New {device} arrived, it is {good}
        {device} battery at {few} percent, help
        Dropped my {device} in the {drink}
        Why is my {device} so slow?
        Wrote {count} lines of code and deleted {count}
        This app tells you when to drink {drink}
        It works on my {device}
        Somebody in {city} built a {device} out of {food}
        Turned the {device} off and on again, works
        We are hiring in {city}: join us
        How to fix your {device} in {few} steps
    """,
    "night": """
        🌙|😴|🎉|🕺
        goodnight|weekend|friday|party|sleep
        Cannot sleep, {activity} at {hour}:{minute}
        Good night {city}, sleep well
        Good morning {city}, time for {drink}
        Party at {place} on {day}, bring {food}
        Up at {hour}:{minute} for no reason
        Out with {name} and {name} {when}
        Weekend plans: {activity}, {food}, {activity}
        Friday night in with {food} and {kin}
        {day} night and I am {activity}
        Danced until {hour} with {name}, feeling {feeling}
        Is everyone else {activity}?
        So {feeling} I could sleep for {few} days
    """,
}
"""Topic, the most likely first: a line of its emoji, a line of its hashtags, then its templates, likewise ordered.

In a template ``{name}`` is a word of that list and ``[...]`` is there half of the time.
"""
